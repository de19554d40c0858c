"""What every range method must satisfy. A new one joins by one row of MEMBERS."""

from __future__ import annotations

import pytest
import torch

from gracile.formats import Int, PerChannel, PerGroup, PerTensor
from gracile.ranges import MSE, Automatic, Entropy, MinMax, MovingAverage, Percentile, Range
from gracile.stats.histogram import StreamingHistogram

MEMBERS: list[Range] = [
    MinMax(),
    Percentile(),
    Percentile(p=99.0),
    MSE(),
    MSE(thresholds=20, power=2.4),
    Entropy(),
    MovingAverage(),
    Automatic(),
]

ACTIVATION_FORMATS = [Int(8, PerTensor(), symmetric=False), Int(4, PerTensor(), symmetric=False), Int(8, PerTensor())]
WEIGHT_FORMATS = [
    Int(8),
    Int(4),
    Int(2),
    Int(4, symmetric=False),
    Int(4, PerGroup(6)),
    Int(5, PerTensor()),
    Int(3, PerChannel(1)),
]

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
each_activation = pytest.mark.parametrize("fmt", ACTIVATION_FORMATS, ids=str)
each_weight = pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=str)


def histogram_of(values: torch.Tensor):
    histogram = StreamingHistogram()
    histogram.update(values)
    return histogram.freeze()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_member
@each_activation
@pytest.mark.parametrize("values", [normal(9999), normal(9999).relu(), -normal(9999).relu(), normal(9999) * 1e-12])
def test_activations_are_represented(member: Range, fmt: Int, values: torch.Tensor) -> None:
    scale, zero_point = member.activation(histogram_of(values), fmt)
    assert (scale.shape, scale.dtype) == ((), torch.float32)
    assert (zero_point.shape, zero_point.dtype) == ((), torch.int16)
    assert 0 < scale.item() < float("inf")
    assert fmt.qmin <= zero_point.item() <= fmt.qmax
    codes = fmt.quantize(values, scale, zero_point)
    decoded = fmt.dequantize(codes, scale, zero_point)
    # 99 % of a normal distribution is inside every method's range here, so half a step bounds those errors.
    inside = (decoded - values).abs() <= scale * 0.51
    assert inside.double().mean() >= (0.97 if fmt.bits == 8 else 0.85)
    assert bool((decoded[values == 0] == 0).all())


@each_member
@each_activation
def test_values_that_are_never_negative_put_zero_at_the_lowest_code(member: Range, fmt: Int) -> None:
    zero_point = member.activation(histogram_of(normal(5000).relu()), fmt)[1]
    assert zero_point.item() == (0 if fmt.symmetric else fmt.qmin)


@each_member
@each_activation
@pytest.mark.parametrize("constant", [0.0, 2.0, -3.0])
def test_constant_activations_are_exact_to_a_step(member: Range, fmt: Int, constant: float) -> None:
    values = torch.full((100,), constant)
    scale, zero_point = member.activation(histogram_of(values), fmt)
    decoded = fmt.dequantize(fmt.quantize(values, scale, zero_point), scale, zero_point)
    # The bins of a constant are 1/2048 of it wide, and a format has at least 16 codes.
    torch.testing.assert_close(decoded, values, rtol=1 / 1000, atol=0)


@each_member
@each_weight
def test_scales_of_weights_clip_and_never_widen(member: Range, fmt: Int) -> None:
    weight = normal(7, 4, 3)
    scale = member.weight(weight, fmt)
    full = MinMax().weight(weight, fmt)
    assert scale.shape == fmt.scale_shape(weight.shape)
    assert scale.dtype == torch.float32
    assert bool((scale != 0).all() if fmt.signed_scale else (scale > 0).all())
    # With the other sign the farther end has the side of one level less. One float32 rounding of the ratio.
    more = torch.where(scale * full < 0, -fmt.qmin / fmt.qmax * (1 + 1 / 20), 1.0)  # up to the next of 20 thresholds
    assert bool((scale.abs() <= full.abs() * more * (1 + 1e-6)).all())
    fmt.decode(fmt.encode(weight, scale))


@each_member
@each_weight
def test_dead_and_single_value_rows_are_represented(member: Range, fmt: Int) -> None:
    weight = torch.zeros(4, 6)
    weight[1, 2] = 0.7
    weight[2] = -0.3
    decoded = fmt.decode(fmt.encode(weight, member.weight(weight, fmt)))
    assert bool((decoded[weight == 0] == 0).all())
    assert torch.isfinite(decoded).all()
    assert decoded[1, 2] > 0
    assert bool((decoded[2] <= 0).all())


@each_member
def test_half_precision_weights_are_accepted(member: Range) -> None:
    assert member.weight(normal(3, 8).half(), Int(4)).dtype == torch.float32
