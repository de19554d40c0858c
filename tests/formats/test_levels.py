"""Formats with a table of levels, against published tables, the bit layouts of torch, and exhaustive search."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    Levels,
    MidRise,
    PerChannel,
    PerGroup,
    PerTensor,
    PowersOfTwo,
    Ternary,
    bits_per_weight,
)

#: bitsandbytes, functional.py, get_4bit_type("nf4").
PUBLISHED_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
PUBLISHED_NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
PUBLISHED_NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
PUBLISHED_NF4 += [0.7229568362236023, 1.0]


def test_nf4_is_the_published_table() -> None:
    assert np.abs(np.array(NF4().levels) - PUBLISHED_NF4).max() < 1e-6  # the published quantiles are of float32


def test_fp4_codes_are_those_of_e2m1() -> None:
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert list(FP4().levels) == values.tolist()
    weight = torch.tensor([[6.0, -6.0, 0.0, 0.5, -1.5, 2.9, -0.1, 5.2]])
    tensors = FP4(PerTensor()).encode(weight)
    low_first = [code for byte in tensors["codes"].tolist() for code in (byte & 15, byte >> 4)]
    assert values[low_first].tolist() == [6.0, -6.0, 0.0, 0.5, -1.5, 3.0, 0.0, 6.0]
    assert 8 not in low_first  # −0


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_codes_are_the_bits_of_the_standard_types(kind: str) -> None:
    dtype = ml_dtypes.float8_e4m3fn if kind == "e4m3" else ml_dtypes.float8_e5m2
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    tensors = FP8(kind).encode(weight)
    scaled = (weight / tensors["scale"].unsqueeze(1)).numpy()
    assert np.array_equal(
        tensors["codes"].numpy().view(dtype).astype(np.float32), scaled.astype(dtype).astype(np.float32)
    )
    assert float(FP8(kind).decode(tensors).abs().max()) == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_mxfp4_takes_its_exponents_from_the_specification() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 3], weight[0, 40], weight[0, 70] = 6.0, 0.9, -32.0
    tensors = MXFP4().encode(weight)
    assert tensors["exponent"].tolist() == [[127 + 0, 127 - 3, 127 + 3]]  # floor(log2 |x|) − 2
    decoded = MXFP4().decode(tensors)
    assert (float(decoded[0, 3]), float(decoded[0, 40]), float(decoded[0, 70])) == (6.0, 0.75, -32.0)
    assert bits_per_weight(MXFP4(), (4, 96)) == 4.25


def test_nvfp4_scales_are_e4m3_of_the_block_and_one_of_the_tensor() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :16], weight[0, 16:], weight[1, 0] = 6.0, 0.75, -2688.0
    tensors = NVFP4().encode(weight)
    assert float(tensors["tensor_scale"]) == 1.0  # 2688 = 6 · 448
    scales = tensors["scale_codes"].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales.tolist() == [[1.0, 0.125], [448.0, 2.0**-9]]
    assert torch.equal(NVFP4().decode(tensors), weight)
    assert bits_per_weight(NVFP4(), (64, 64)) == pytest.approx(4.5, abs=0.01)


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (3, [0, 1 / 4, 1 / 2, 1]),
        (4, [n / 10 for n in (0, 1, 2, 3, 4, 6, 8, 10)]),  # sixteenths of 10, the largest sum
    ],
)
def test_powers_of_two_are_the_sums_of_their_source(bits: int, levels: list[float]) -> None:
    found = sorted({abs(level) for level in PowersOfTwo(bits).levels})
    assert found == pytest.approx(levels)


def test_of_four_bits_besides_the_sign_all_sixteen_sums_are_levels() -> None:
    """Terms of 64ths: p₁ of 0, 32, 8, 2 and p₂ of 0, 16, 4, 1, the largest 48."""
    expected = sorted({(a + b) / 48 for a in (0, 32, 8, 2) for b in (0, 16, 4, 1)})
    assert sorted({abs(level) for level in PowersOfTwo(5).levels}) == pytest.approx(expected) and len(expected) == 16
    for bits in (2, 6):
        with pytest.raises(ConfigError, match="3, 4 or 5"):
            PowersOfTwo(bits)


def test_ternary_scales_and_zeros_are_the_best_there_are() -> None:
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    decoded = Ternary().decode(Ternary().encode(weight)).double()
    signs = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=7)), dtype=torch.float64)[:, :]
    norms = signs.square().sum(1).clamp(min=1)
    for row, found in zip(weight, decoded):
        scale = (signs @ row / norms).unsqueeze(1)
        least = (signs * scale - row).square().sum(1).min()
        assert float((found - row).square().sum()) == pytest.approx(float(least), rel=1e-6)
    assert bits_per_weight(Ternary(PerTensor()), (100, 100)) == pytest.approx(1.6, abs=0.01)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 243])
def test_five_weights_of_three_levels_share_a_byte(count: int) -> None:
    weight = torch.randint(-1, 2, (1, count), generator=torch.Generator().manual_seed(count)).float()
    tensors = Ternary().encode(weight, torch.ones(1))
    assert tensors["codes"].numel() == -(-count // 5)
    assert torch.equal(Ternary().decode(tensors), weight)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="e4m3"):
        FP8("e3m4")
    with pytest.raises(ConfigError, match="positive numbers of shape"):
        NF4(PerChannel(0)).encode(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ConfigError, match="at least 1"):
        NF4(PerGroup(0))


def test_binary_is_the_sign_times_the_mean_magnitude() -> None:
    weight = torch.tensor([[0.5, -1.5, 1.0, -3.0], [0.0, 0.0, 0.0, 0.0]])
    tensors = Binary().encode(weight)
    assert tensors["scale"][0].item() == 1.5 and tensors["codes"].numel() == 1  # eight weights to a byte
    decoded = Binary().decode(tensors)
    assert decoded[0].tolist() == [1.5, -1.5, 1.5, -1.5]
    assert float(decoded[1].abs().max()) < 1e-30
    for scale in torch.linspace(0.5, 3, 50):  # no other scale has a smaller squared error
        other = scale * torch.tensor([1.0, -1.0, 1.0, -1.0])
        assert (weight[0] - other).square().sum() >= (weight[0] - decoded[0]).square().sum() - 1e-6
    assert bits_per_weight(Binary(PerTensor()), (100, 100)) == pytest.approx(1.0, abs=0.01)


def test_mid_rise_rounds_to_odd_multiples_of_the_scale() -> None:
    x = torch.tensor([[-9.0, -2.1, -2.0, -0.1, 0.0, 0.1, 1.9, 2.0, 2.1, 9.0]])
    decoded = MidRise(2).decode(MidRise(2).encode(x, torch.ones(1)))
    assert decoded[0].tolist() == [-3, -3, -3, -1, -1, 1, 1, 1, 3, 3]  # halfway to the lower
    assert torch.equal(MidRise(2).nearest(x), decoded)
    assert MidRise(3).levels == (-7, -5, -3, -1, 1, 3, 5, 7)
    assert bits_per_weight(MidRise(2, PerTensor()), (100, 100)) == pytest.approx(2.0, abs=0.01)
    for bits in (1, 8, True):
        with pytest.raises(ConfigError, match="from 2 to 7"):
            MidRise(bits)


def test_of_normal_weights_mid_rise_keeps_more_than_integers_do() -> None:
    """The error of the best uniform quantizers of four levels: .1188 (Max 1960, table II) with zero in the middle."""
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    errors = []
    for scale in torch.linspace(0.4, 0.6, 21):
        decoded = MidRise(2).decode(MidRise(2).encode(weight, scale.reshape(1)))
        errors.append(float((decoded - weight).square().mean()))
    assert min(errors) == pytest.approx(0.1188, abs=0.002)


@pytest.mark.parametrize(
    "fmt", [NF4(PerChannel(0)), FP4(PerChannel(0)), PowersOfTwo(4), Ternary(), Binary(), MidRise(3)]
)
def test_the_nearest_level_is_what_encoding_gives(fmt: Levels) -> None:
    x = torch.cat([torch.randn(3, 40, generator=torch.Generator().manual_seed(2)), torch.zeros(3, 1)], 1)
    assert torch.equal(fmt.nearest(x), fmt.decode(fmt.encode(x, torch.ones(3))))
