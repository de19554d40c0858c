"""Formats with a table of levels, against published tables, the bit layouts of torch, and exhaustive search."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import FP4, FP8, MXFP4, NF4, PerChannel, PerGroup, PerTensor, Ternary, bits_per_weight

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
