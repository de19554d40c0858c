from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import Int, PerChannel, PerGroup, PerTensor
from gracile.layer_stats import Histogram
from gracile.ranges import MSE, Automatic, Entropy, MinMax, MovingAverage, Percentile
from gracile.stats.histogram import StreamingHistogram

U8 = Int(8, PerTensor(), symmetric=False)
U4 = Int(4, PerTensor(), symmetric=False)


def histogram_of(values: torch.Tensor):
    histogram = StreamingHistogram()
    histogram.update(values)
    return histogram.freeze()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_min_max_uses_the_exact_extremes() -> None:
    scale, zero_point = MinMax().activation(histogram_of(torch.tensor([-1.0, 0.3, 4.1])), U8)
    assert scale.item() == pytest.approx(5.1 / 255)
    assert zero_point.item() == 50
    weight = normal(3, 5)
    expected = np.abs(weight.numpy()).max(axis=1) / 127
    np.testing.assert_allclose(MinMax().weight(weight, Int(8)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9])
def test_percentile_of_activations_equals_numpys(p: float) -> None:
    values = normal(200_000) + 0.5
    scale, _ = Percentile(p).activation(histogram_of(values), U8)
    low, high = np.percentile(values.numpy(), [100 - p, p])
    # The histogram knows a percentile to one bin, 1/2048 of a range of about 9.
    assert scale.item() * 255 == pytest.approx(high - low, abs=2 * 9.5 / 2048)


def test_percentile_of_weights_equals_numpys() -> None:
    weight = normal(4, 1000)
    low, high = np.percentile(weight.numpy(), [1, 99], axis=1)
    size = np.maximum(np.maximum(-low, high) / 8, np.minimum(-low, high) / 7)
    expected = np.where(high > -low, -size, size)
    np.testing.assert_allclose(Percentile(99).weight(weight, Int(4)).numpy(), expected, rtol=1e-5)


def test_percentile_100_is_min_max() -> None:
    weight, values = normal(4, 30), histogram_of(normal(1000))
    assert torch.equal(Percentile(100).weight(weight, Int(4)), MinMax().weight(weight, Int(4)))
    assert Percentile(100).activation(values, U8) == MinMax().activation(values, U8)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("fmt", [Int(4), Int(3, PerGroup(10)), Int(4, symmetric=False), Int(2, PerChannel(1))], ids=str)
def test_mse_of_weights_equals_brute_force(fmt: Int, power: float) -> None:
    weight = normal(6, 40)
    weight[0, 0] = 9.0
    full = MinMax().weight(weight, fmt)
    chosen = MSE(thresholds=25, power=power).weight(weight, fmt)

    def errors(scale: torch.Tensor) -> np.ndarray:
        difference = (fmt.decode(fmt.encode(weight, scale)) - weight).abs().numpy().astype(np.float64) ** power
        if fmt.granularity == PerGroup(10):
            return difference.reshape(6, 4, 10).sum(axis=2)
        return difference.sum(axis=0 if fmt.granularity == PerChannel(1) else 1)

    if fmt.symmetric:  # either sign, and with the other one as much more as the farther end then needs
        most = math.ceil(25 * 2 ** (fmt.bits - 1) / (2 ** (fmt.bits - 1) - 1))
        fractions = [sign * k / 25 for k in range(1, most + 1) for sign in (1, -1)]
    else:
        fractions = [k / 25 for k in range(1, 26)]
    candidates = np.stack([errors(full * fraction) for fraction in fractions])
    np.testing.assert_allclose(errors(chosen), candidates.min(axis=0), rtol=1e-5)
    assert bool((errors(chosen) <= errors(full)).all())


def test_mse_finds_that_an_outlier_is_better_clipped() -> None:
    weight = normal(1, 4096)
    weight[0, 0] = 40.0
    assert abs(MSE().weight(weight, Int(4)).item()) < 0.5 * abs(MinMax().weight(weight, Int(4)).item())


@pytest.mark.parametrize(
    "values", [normal(50_000), normal(50_000).relu(), torch.nn.functional.gelu(normal(50_000) * 2)]
)
@pytest.mark.parametrize("fmt", [U4, U8, Int(4, PerTensor())], ids=str)
def test_mse_of_activations_is_below_every_joint_threshold(values: torch.Tensor, fmt: Int) -> None:
    histogram = histogram_of(values)
    x = (np.arange(2048) + 0.5) / 2048 * (histogram.high - histogram.low) + histogram.low
    counts = histogram.counts.numpy()

    def error(scale: float, zero: int) -> float:
        q = np.clip(np.round(x / scale) + zero, fmt.qmin, fmt.qmax)
        return float((counts * (x - (q - zero) * scale) ** 2).sum())

    chosen = error(*(t.item() for t in MSE(thresholds=32).activation(histogram, fmt)))
    for k in range(1, 33):
        low, high = min(histogram.minimum, 0) * k / 32, max(histogram.maximum, 0) * k / 32
        scale = max(-low, high) / fmt.qmax if fmt.symmetric else (high - low) / fmt.qmax
        zero = 0 if fmt.symmetric else int(np.round(-low / scale))
        assert chosen <= error(scale, zero) * (1 + 1e-4)  # the scale is rounded to float32


@pytest.mark.parametrize("bad", [lambda: Percentile(50), lambda: Percentile(101), lambda: MSE(0), lambda: MSE(power=0)])
def test_impossible_settings_are_refused(bad) -> None:
    with pytest.raises(ConfigError):
        bad()


def published_entropy(counts: np.ndarray, levels: int) -> int:
    """Migacz's slides, for values from 0: the number of bins kept, by plain loops."""
    best, least = 0, np.inf
    for kept in range(levels + 1, len(counts) + 1):
        p = counts[:kept].astype(float).copy()
        p[-1] += counts[kept:].sum()
        step, q = kept / (levels - 1), np.zeros(kept)
        codes = np.clip(np.rint((np.arange(kept) + 0.5) / step), 0, levels - 1).astype(int)
        for code in range(levels):
            members = (codes == code) & (p > 0)
            if members.any():
                q[members] = counts[:kept][codes == code].sum() / members.sum()
        used = p > 0
        p, q = p[used] / p.sum(), np.maximum(q[used] / q.sum(), 1e-12)
        divergence = float((p * np.log(p / q)).sum())
        if divergence <= least:
            best, least = kept, divergence
    return best


def test_entropy_keeps_the_bins_that_the_published_loop_keeps() -> None:
    generator = np.random.default_rng(0)
    counts = np.histogram(np.abs(generator.laplace(size=20000)) * 10, bins=64, range=(0, 64))[0]
    histogram = Histogram(torch.from_numpy(counts).double(), 0.0, 64.0, 0.0, 64.0, ((0.0, 64.0),))
    fmt = Int(4, PerTensor(), symmetric=False)
    scale, zero = Entropy(thresholds=64).activation(histogram, fmt)
    kept = published_entropy(counts, 16)
    assert 16 < kept < 64
    assert float(scale) == pytest.approx(kept / 15) and int(zero) == 0


def test_entropy_clips_outliers_that_a_full_range_keeps() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0
    histogram = StreamingHistogram()
    histogram.update(values)
    fmt = Int(8, PerTensor(), symmetric=False)
    scale = Entropy().activation(histogram.freeze(), fmt)[0]
    assert float(scale) < 0.5 * float(MinMax().activation(histogram.freeze(), fmt)[0])


def test_entropy_leaves_weights_their_full_range() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Entropy().weight(weight, Int(4)), MinMax().weight(weight, Int(4)))
    with pytest.raises(ConfigError, match="at least 1"):
        Entropy(thresholds=0)


def test_moving_average_is_that_of_pytorch() -> None:
    """PyTorch's observer is the reference: the same extremes after the same batches."""
    from torch.ao.quantization import MovingAverageMinMaxObserver

    observer, histogram = MovingAverageMinMaxObserver(averaging_constant=0.2), StreamingHistogram()
    for seed in range(5):
        batch = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        observer(batch)
        histogram.update(batch)
    fmt = Int(8, PerTensor(), symmetric=False)
    scale = MovingAverage(rate=0.2).activation(histogram.freeze(), fmt)[0]
    assert scale.item() == pytest.approx(float(observer.max_val - observer.min_val) / 255, rel=1e-6)
    assert MovingAverage(rate=1.0).activation(histogram.freeze(), fmt)[0] == pytest.approx(
        (batch.max() - batch.min()).item() / 255, rel=1e-6
    )
    with pytest.raises(ConfigError, match="rate"):
        MovingAverage(rate=0)


def squared_error(decoded: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    return ((decoded - values).numpy().astype(np.float64) ** 2).sum(-1)


@pytest.mark.parametrize("fmt", [U8, U4], ids=str)
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_automatic_takes_the_candidate_of_least_error(fmt: Int, outlier: float) -> None:
    values = normal(100_000)
    values[0] = outlier
    candidates = (Entropy(), MinMax(), Percentile(99.0), MSE())
    found = {c: c.activation(histogram_of(values), fmt) for c in (*candidates, Automatic(candidates))}
    errors = {c: squared_error(fmt.dequantize(fmt.quantize(values, *grid), *grid), values) for c, grid in found.items()}
    # bins of a 2048th of the range blur what error a candidate has
    assert errors.pop(Automatic(candidates)) <= 1.02 * min(errors.values())
    assert max(errors.values()) > 1.1 * min(errors.values())


@pytest.mark.parametrize("fmt", [Int(4), Int(4, symmetric=False), Int(3, PerGroup(8))], ids=str)
def test_automatic_takes_for_each_row_what_serves_it_best(fmt: Int) -> None:
    rows = normal(12, 64)
    rows[::2, 0] = 12.0
    candidates = (MinMax(), Percentile(90.0), MSE(thresholds=9))
    importance = normal(64, seed=1).square()
    errors = []
    for range_ in (*candidates, Automatic(candidates)):
        scale, zero = (t.unsqueeze(1).float() for t in range_.rows(rows, fmt, importance))
        codes = (torch.round(rows / scale) + zero).clamp(fmt.qmin, fmt.qmax)
        errors.append(((((codes - zero) * scale) - rows).square() * importance).sum(1))
    torch.testing.assert_close(errors[-1], torch.stack(errors[:-1]).amin(0))
    assert len(torch.stack(errors[:-1]).argmin(0).unique()) > 1


@pytest.mark.parametrize("bad", [{"candidates": (MSE(),)}, {"candidates": (MSE(), "MinMax")}, {"batches": 0}])
def test_automatic_refuses_what_leaves_no_choice(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Automatic"):
        Automatic(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="of its own"):
        Automatic((MSE(), Automatic()))
