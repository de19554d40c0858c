"""What every number format must satisfy. A new format joins by one row of MEMBERS."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gracile.formats import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    FixedPoint,
    Format,
    Int,
    Levels,
    MidRise,
    PerChannel,
    PerGroup,
    PerTensor,
    PowersOfTwo,
    Ternary,
    format_from_config,
    format_to_config,
)
from tests.labels import label

Step = Callable[[Tensor, dict[str, Tensor]], Tensor]


def per_tensor(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["scale"].expand(weight.shape)


def per_row(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["scale"].abs().reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)


def per_column(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["scale"].abs().reshape(1, -1, *[1] * (weight.ndim - 2)).expand(weight.shape)


def per_group_of_6(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["scale"].abs().repeat_interleave(6, dim=1).reshape(weight.shape)


def per_group_of_4(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    columns = weight[0].numel()
    return tensors["scale"].abs().repeat_interleave(4, dim=1)[:, :columns].reshape(weight.shape)


def constant_256th(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return torch.full(weight.shape, 1 / 256)


def level_gap(fmt: Levels, weight: Tensor, scale: Tensor) -> Tensor:
    """The distance between the levels that a weight lies between, the wider one where it lies on a level."""
    levels = sorted(set(fmt.levels))
    x = weight.double() / scale.double()
    gaps = [
        torch.where((x >= a - 1e-6) & (x <= b + 1e-6), torch.full_like(x, b - a), torch.zeros_like(x))
        for a, b in pairwise(levels)
    ]
    beyond = 2 * (x.abs() - max(levels)).clamp(min=0)
    return torch.maximum(torch.stack(gaps).amax(0), beyond) * scale.double()


def of_nf4(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return level_gap(NF4(), weight, tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)))


def of_fp4(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return level_gap(FP4(), weight, tensors["scale"])


def of_ternary(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return level_gap(Ternary(), weight, tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)))


def of_binary(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return level_gap(Binary(), weight, tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)))


def of_mid_rise(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return 2 * tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight).double()


def of_mxfp4(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    exponent = tensors["exponent"].repeat_interleave(32, dim=1)[:, : weight[0].numel()].reshape(weight.shape)
    return level_gap(FP4(), weight, 2.0 ** (exponent.double() - 127))


def of_nvfp4(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    scale = tensors["scale_codes"].view(torch.float8_e4m3fn).double() * tensors["tensor_scale"].double()
    scale = scale.repeat_interleave(16, dim=1)[:, : weight[0].numel()].reshape(weight.shape)
    return level_gap(FP4(), weight, scale)


def of_powers(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return level_gap(PowersOfTwo(), weight, tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)))


def of_codebook(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The distance to the nearest level, twice: half of it is all that an encoder may be off."""
    return 2 * (weight.double().unsqueeze(-1) - tensors["levels"].double()).abs().amin(-1)


def of_fp8(bits: int, smallest: float) -> Step:
    """Steps of floating point with so many bits of mantissa, no finer than the smallest."""

    def step(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        scale = tensors["scale"].reshape(-1, *[1] * (weight.ndim - 1)).double()
        _, power = torch.frexp((weight.double() / scale).abs() * (1 + 1e-6))
        return torch.maximum(2.0 ** (power.double() - 1 - bits), torch.tensor(smallest)) * scale

    return step


#: format, distance between neighbouring representable values at each weight, largest magnitude it is meant for.
MEMBERS: list[tuple[Format, Step, float]] = [
    *[(Int(bits), per_row, 1e30) for bits in range(2, 9)],
    *[(Int(bits, symmetric=False), per_row, 1e30) for bits in range(2, 9)],
    (Int(8, PerTensor()), per_tensor, 1e30),
    (Int(5, PerTensor(), symmetric=False), per_tensor, 1e30),
    (Int(8, PerChannel(1)), per_column, 1e30),
    (Int(3, PerChannel(1), symmetric=False), per_column, 1e30),
    (Int(4, PerGroup(6)), per_group_of_6, 1e30),
    (Int(2, PerGroup(6), symmetric=False), per_group_of_6, 1e30),
    (Int(3, PerGroup(4)), per_group_of_4, 1e30),
    (Int(4, PerGroup(4), symmetric=False), per_group_of_4, 1e30),
    (NF4(PerChannel(0)), of_nf4, 1e30),
    (FP4(PerTensor()), of_fp4, 1e30),
    (Ternary(), of_ternary, 1e30),
    (Binary(), of_binary, 1e30),
    *[(MidRise(bits), of_mid_rise, 1e30) for bits in (2, 3, 7)],
    (FP8(), of_fp8(3, 2.0**-9), 1e30),
    (FP8("e5m2"), of_fp8(2, 2.0**-16), 1e30),
    (MXFP4(), of_mxfp4, 1e30),
    (NVFP4(), of_nvfp4, 1e30),
    (PowersOfTwo(), of_powers, 1e30),
    (Codebook(3), of_codebook, 1e30),
    (Codebook(1), of_codebook, 1e30),
    (FixedPoint(256), constant_256th, 8e6),
]
#: Three roundings to float32 (scale, quotient, product), each 2^-24 of at most 255 steps, come to 4.6e-5 steps.
ROUNDING_STEPS = 1e-4

each_member = pytest.mark.parametrize(("fmt", "step", "limit"), MEMBERS, ids=label)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Weights of every magnitude and awkward content; every shape has columns in groups of 6."""
    shape = draw(st.sampled_from([(1, 6), (7, 6), (3, 30), (5, 2, 3), (3, 6, 1, 1), (5, 4, 3, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "positive", "zero", "constant", "zero row", "outlier", "few values"]))
    weight = torch.randn(shape, generator=generator)
    if kind == "positive":
        weight = weight.abs() + 0.5
    elif kind == "zero":
        weight = torch.zeros(shape)
    elif kind == "constant":
        weight = weight.flatten()[0].expand(shape).clone()
    elif kind == "zero row":
        weight[0] = 0
    elif kind == "outlier":
        weight.flatten()[0] *= 1e4
    elif kind == "few values":
        weight = weight.sign() * 0.5
    weight = weight * 10.0 ** draw(st.integers(-44, 25))
    return weight.to(draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])))


def inside(weight: Tensor, limit: float) -> bool:
    return bool(torch.isfinite(weight.float()).all()) and float(weight.float().abs().max()) <= limit


@each_member
@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_decoded_weights_are_within_half_a_step(fmt: Format, step: Step, limit: float, weight: Tensor) -> None:
    if not inside(weight, limit):
        return
    tensors = fmt.encode(weight)
    decoded = fmt.decode(tensors)
    assert decoded.dtype == torch.float32
    assert decoded.shape == weight.shape
    steps = step(weight, tensors).double()
    # For fixed point the step is constant, so the float32 rounding of a large weight counts on its own.
    bound = (0.5 + ROUNDING_STEPS) * steps + 2.0**-23 * weight.double().abs()
    assert bool(((decoded.double() - weight.float().double()).abs() <= bound).all())


@each_member
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_zero_stays_exactly_zero(fmt: Format, step: Step, limit: float, weight: Tensor) -> None:
    if not inside(weight, limit) or isinstance(fmt, (Binary, MidRise)):  # without a zero: pruned layers are refused
        return
    decoded = fmt.decode(fmt.encode(weight))
    assert bool((decoded[weight == 0] == 0).all())


@each_member
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_encoding_a_decoded_weight_again_gives_the_same_codes(
    fmt: Format, step: Step, limit: float, weight: Tensor
) -> None:
    if not inside(weight, limit):
        return
    first = fmt.encode(weight)
    given_again = {
        name: first[name]
        for name in ("scale", "zero_point", "exponent", "levels", "scale_codes", "tensor_scale")
        if name in first
    }
    second = fmt.encode(fmt.decode(first), **given_again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_member
@pytest.mark.parametrize("shape", [(1, 6), (7, 18), (5, 6, 3, 3), (3, 6, 1)])
def test_bytes_are_as_declared(fmt: Format, step: Step, limit: float, shape: tuple[int, ...]) -> None:
    tensors = fmt.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "shape")
    assert stored == fmt.size_bytes(shape)
    assert tensors["shape"].tolist() == list(shape)
    assert tensors["shape"].dtype == torch.int64


@each_member
def test_survives_a_file_bit_for_bit(fmt: Format, step: Step, limit: float, tmp_path) -> None:
    weight = torch.randn(7, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    tensors = fmt.encode(weight)
    save_file(tensors, tmp_path / "weight.safetensors")
    read = load_file(tmp_path / "weight.safetensors")
    assert torch.equal(fmt.decode(read), fmt.decode(tensors))
    assert format_from_config(format_to_config(fmt)) == fmt


@each_member
def test_the_weight_is_left_alone_and_the_answer_repeats(fmt: Format, step: Step, limit: float) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 12, generator=torch.Generator().manual_seed(2)))
    before = weight.detach().clone()
    first, second = fmt.encode(weight), fmt.encode(weight)
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(first[name], second[name]) and not first[name].requires_grad for name in first)


@each_member
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(fmt: Format, step: Step, limit: float, bad: float) -> None:
    weight = torch.ones(2, 6)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN"):
        fmt.encode(weight)
