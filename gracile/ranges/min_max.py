"""Min-max: the range holds every value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, full_range, scale_and_zero


@dataclass(frozen=True)
class MinMax(Range):
    """range = [minimum, maximum]. Nothing is clipped; one outlier coarsens the steps for all."""

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point that hold the exact extremes seen."""
        return scale_and_zero(fmt, histogram.minimum, histogram.maximum)

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scale that holds every weight; importance plays no part."""
        return full_range(rows, fmt)
