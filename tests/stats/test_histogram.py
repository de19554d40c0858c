from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import DataError
from gracile.stats.histogram import StreamingHistogram


def streamed(batches: list[torch.Tensor], bins: int = 2048):
    histogram = StreamingHistogram(bins)
    for batch in batches:
        histogram.update(batch)
    return histogram.freeze()


def test_counts_equal_numpy_over_the_final_range() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 500, generator=generator).double() * scale for scale in (0.1, 1, 30, 0.5, 400)]
    frozen = streamed(batches)
    values = torch.cat([b.flatten() for b in batches]).numpy()
    expected, _ = np.histogram(values, bins=2048, range=(frozen.low, frozen.high))
    assert (frozen.minimum, frozen.maximum) == (values.min(), values.max())
    assert frozen.low <= frozen.minimum
    assert frozen.high >= frozen.maximum
    # Values on an edge may fall to either side: cumulative counts differ by those few at most.
    difference = np.abs(np.cumsum(frozen.counts.numpy()) - np.cumsum(expected))
    assert difference.max() <= 2
    assert frozen.counts.sum().item() == len(values)


def test_doubling_by_hand() -> None:
    histogram = StreamingHistogram(4)
    histogram.update(torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 4.0]))
    assert histogram.counts.tolist() == [2, 1, 1, 2]
    histogram.update(torch.tensor([5.0]))  # [0, 8]: pairs merge into the lower half
    assert (histogram.low, histogram.high) == (0.0, 8.0)
    assert histogram.counts.tolist() == [3, 3, 1, 0]
    histogram.update(torch.tensor([-1.0]))  # [-8, 8]: pairs merge into the upper half
    assert (histogram.low, histogram.high) == (-8.0, 8.0)
    assert histogram.counts.tolist() == [0, 1, 6, 1]


@pytest.mark.parametrize("constant", [0.0, 3.0, -2.5])
def test_a_constant_beginning_is_counted_once_values_differ(constant: float) -> None:
    frozen = streamed([torch.full((7,), constant), torch.full((3,), constant), torch.tensor([constant, 10.0])])
    assert frozen.counts.sum().item() == 12
    position = (constant - frozen.low) / (frozen.high - frozen.low) * 2048
    assert frozen.counts[min(int(position), 2047)].item() == 11


@pytest.mark.parametrize(("constant", "bounds"), [(0.0, (0, 1)), (3.0, (0, 3)), (-2.5, (-2.5, 0))])
def test_a_stream_that_stays_constant(constant: float, bounds: tuple[float, float]) -> None:
    frozen = streamed([torch.full((7,), constant), torch.full((3,), constant)])
    assert (frozen.minimum, frozen.maximum) == (constant, constant)
    assert (frozen.low, frozen.high) == bounds
    assert frozen.counts.sum().item() == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_any_dtype_counts(dtype: torch.dtype) -> None:
    frozen = streamed([torch.arange(8).to(dtype), torch.zeros(0)])
    assert frozen.counts.sum().item() == 8
    assert frozen.maximum == 7.0


def test_a_range_of_denormals_and_a_huge_jump_lose_no_value() -> None:
    frozen = streamed([torch.tensor([0.0, 1e-45]), torch.tensor([3e38, -3e38])])
    assert frozen.counts.sum().item() == 4
    assert frozen.high >= 3e38 * 0.999


def test_a_large_batch_is_counted_whole_across_chunks() -> None:
    batch = torch.rand((1 << 20) + 17, generator=torch.Generator().manual_seed(1))
    assert streamed([batch]).counts.sum().item() == batch.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        streamed([torch.tensor([0.0, bad, 1.0])])


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(DataError, match="saw no values"):
        StreamingHistogram().freeze()


def test_memory_does_not_grow() -> None:
    histogram = StreamingHistogram()
    for scale in (1.0, 1e3, 1e9):
        histogram.update(torch.randn(1000, generator=torch.Generator().manual_seed(2)) * scale)
    tensors = [value for value in vars(histogram).values() if isinstance(value, torch.Tensor)]
    assert [t.numel() for t in tensors] == [2048]
