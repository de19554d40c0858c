"""Entropy: the range whose codes tell most about where the values lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, full_range, scale_and_zero


@dataclass(frozen=True)
class Entropy(Range):
    """argmin over ranges T of KL(P_T ‖ Q_T), T among `thresholds` equal fractions of [minimum, maximum].

    P_T is the histogram inside T with what lies outside added to its end bins; Q_T what the format leaves of the
    histogram inside: the counts that share a code are spread evenly over their bins that are not empty. Ranges of fewer
    bins than the format has codes say nothing and are not tried. The peak at zero that a ReLU makes is brought down to
    its neighbours first. For activations; weights take their full range.
    Source: Migacz 2017, 8-bit Inference with TensorRT; here each end of a range that is not symmetric is found.
    """

    thresholds: int = 128

    def __post_init__(self) -> None:
        if self.thresholds < 1:
            raise ConfigError(f"Entropy(thresholds={self.thresholds}): at least 1 is needed.")

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the best range: both ends shrunk together, then each on its own."""
        low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
        shares = [step / self.thresholds for step in range(self.thresholds, 0, -1)]
        counts = _without_zero_peak(histogram)
        width = (histogram.high - histogram.low) / len(counts)
        centres = histogram.low + width * (torch.arange(len(counts)).double() + 0.5)
        low, high = _best(counts, centres, fmt, [(low * share, high * share) for share in shares])
        low, high = _best(counts, centres, fmt, [(low, high * share) for share in shares])
        low, high = _best(counts, centres, fmt, [(low * share, high) for share in shares])
        return scale_and_zero(fmt, low, high)

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The full range: one row has too few weights for a histogram. importance plays no part."""
        return full_range(rows, fmt)


def _best(counts: Tensor, centres: Tensor, fmt: Int, ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """The range of least divergence; of equal ones the first, which is the widest."""
    best, least = ranges[0], float("inf")
    for low, high in ranges:
        inside = (centres >= low) & (centres <= high)
        if int(inside.sum()) <= fmt.qmax - fmt.qmin:
            break
        divergence = _divergence(counts, centres, inside, fmt, low, high)
        if divergence < least:
            best, least = (low, high), divergence
    return best


def _without_zero_peak(histogram: Histogram) -> Tensor:
    """The counts, with those of zero as its neighbours have them: zeros of a ReLU say nothing of the range."""
    counts = histogram.counts.clone()
    width = (histogram.high - histogram.low) / len(counts)
    if width > 0 and histogram.low <= 0 <= histogram.high:
        zero = min(int(-histogram.low / width), len(counts) - 1)
        counts[zero] = torch.minimum(counts[zero], counts[max(0, zero - 1) : zero + 2].sort().values[:-1].max())
    return counts


def _divergence(counts: Tensor, centres: Tensor, inside: Tensor, fmt: Int, low: float, high: float) -> float:
    """KL of the clipped histogram from what is left of it once it is rounded, in nats."""
    kept, places = counts[inside], inside.nonzero().squeeze(1)
    clipped = kept.clone()
    clipped[0] += counts[: places[0]].sum()
    clipped[-1] += counts[places[-1] + 1 :].sum()
    scale, zero = (float(t) for t in scale_and_zero(fmt, low, high))
    codes = (torch.round(centres[inside] / scale) + zero).clamp(fmt.qmin, fmt.qmax).long() - fmt.qmin
    used = clipped > 0
    sums = torch.zeros(fmt.qmax - fmt.qmin + 1, dtype=torch.float64).index_add_(0, codes, kept)
    members = torch.zeros_like(sums).index_add_(0, codes, used.double())
    spread = (sums / members.clamp_min(1))[codes][used]
    p, q = clipped[used] / clipped.sum(), spread / spread.sum().clamp_min(1e-300)
    return float((p * (p / q.clamp_min(1e-12)).log()).sum())
