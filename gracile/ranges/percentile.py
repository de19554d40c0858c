"""Percentile: the range leaves out a given share of the values at either end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, full_range, scale_and_zero


@dataclass(frozen=True)
class Percentile(Range):
    """range = [percentile 100 − p, percentile p], linearly interpolated.

    p: above 50, at most 100; 100 is min-max.
    """

    p: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.p <= 100:
            raise ConfigError(f"Percentile(p={self.p}): p is a percentage above 50, such as 99.99.")

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point from the histogram's cumulative counts, values spread evenly inside a bin."""
        low = max(_quantile(histogram, 1 - self.p / 100), histogram.minimum)
        high = min(_quantile(histogram, self.p / 100), histogram.maximum)
        return scale_and_zero(fmt, low, high)

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scale that both percentiles fit in; asymmetric, of the full range's zero point.

        importance plays no part.
        """
        scale, zero = full_range(rows, fmt)
        last = rows.shape[1] - 1
        ordered = rows.sort(dim=1).values
        low = _interpolate(ordered, last * (1 - self.p / 100)).clamp(max=0)
        high = _interpolate(ordered, last * self.p / 100).clamp(min=0)
        if fmt.symmetric:  # a row of mostly zeros has percentiles of 0; its extremes are then all there is to represent
            return torch.where(low == high, scale, fmt.weight_scale_of(low, high)[0]), zero
        ratio = torch.maximum(_share(low, ordered[:, 0]), _share(high, ordered[:, -1]))
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        return scale * ratio, zero


def _quantile(histogram: Histogram, share: float) -> float:
    """The value below which this share of the counts lies."""
    cumulative = histogram.counts.cumsum(0)
    total = float(cumulative[-1])
    wanted = share * total
    index = int(torch.searchsorted(cumulative, wanted).clamp(max=len(cumulative) - 1))
    count = float(histogram.counts[index])
    inside = (wanted - (float(cumulative[index]) - count)) / count if count else 0.0
    return histogram.low + (histogram.high - histogram.low) * (index + inside) / len(cumulative)


def _interpolate(ordered: Tensor, position: float) -> Tensor:
    below = int(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, torch.zeros_like(part), part / whole)
