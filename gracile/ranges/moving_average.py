"""Moving average: the range that batches have on average, late ones counting most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, full_range, scale_and_zero


@dataclass(frozen=True)
class MovingAverage(Range):
    """r ← r + rate · (extreme of the batch − r) for either end of the range, batch after batch from the first one's.

    rate: above 0, at most 1. For activations; weights take their full range.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1; the default rate is that of PyTorch's observer.
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"MovingAverage(rate={self.rate}): expected a number above 0, at most 1.")

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the averaged extremes."""
        (low, high), *later = histogram.extremes
        for minimum, maximum in later:
            low += self.rate * (minimum - low)
            high += self.rate * (maximum - high)
        return scale_and_zero(fmt, low, high)

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scale that holds every weight; importance plays no part."""
        return full_range(rows, fmt)
