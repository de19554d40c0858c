"""Min-max: the range holds every value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, scale_and_zero, weight_rows


@dataclass(frozen=True)
class MinMax(Range):
    """range = [minimum, maximum]. Nothing is clipped; one outlier coarsens the steps for all."""

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point that hold the exact extremes seen."""
        return scale_and_zero(fmt, histogram.minimum, histogram.maximum)

    def weight(self, weight: Tensor, fmt: Int) -> Tensor:
        """The scale that holds every weight."""
        return weight_rows(weight, fmt)[1].reshape(fmt.scale_shape(weight.shape))
