"""Automatic: of several range methods the one that harms most what is computed from the values least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range
from gracile.ranges.entropy import Entropy
from gracile.ranges.min_max import MinMax
from gracile.ranges.mse import MSE
from gracile.ranges.percentile import Percentile


@dataclass(frozen=True)
class Automatic(Range):
    """argmin over the candidates of ‖f(Q(x)) − f(x)‖², f the layer that reads x.

    candidates: range methods; of equal errors the first wins. batches: of the calibration data that layers are tried
    on.

    `Quantize` compares the candidates for each layer's inputs by the outputs of the float layer. Where no layer is at
    hand, f is the identity: grids of outputs have the candidate of least squared error on the histogram, and each row
    of a weight that of least error, weighted by importance where the caller gives it.
    """

    candidates: tuple[Range, ...] = (MSE(), MinMax(), Percentile(99.99), Percentile(99.9), Entropy())
    batches: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, tuple) or len(self.candidates) < 2:
            raise ConfigError(f"Automatic(candidates={self.candidates!r}): a tuple of two range methods at least.")
        for candidate in self.candidates:
            if not isinstance(candidate, Range) or isinstance(candidate, Automatic):
                raise ConfigError(f"Automatic(candidates=...): {candidate!r} is not a range method of its own.")
        if self.batches < 1:
            raise ConfigError(f"Automatic(batches={self.batches!r}): at least 1.")

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of least squared error, every value counted at the middle of its bin."""
        bins = len(histogram.counts)
        values = histogram.low + (histogram.high - histogram.low) * (torch.arange(bins).double() + 0.5) / bins
        found = [candidate.activation(histogram, fmt) for candidate in self.candidates]
        errors = []
        for scale, zero in found:
            codes = torch.round(values / scale.double()).add_(zero).clamp_(fmt.qmin, fmt.qmax)
            errors.append(float(((codes - zero) * scale.double() - values).square() @ histogram.counts))
        return found[min(range(len(found)), key=errors.__getitem__)]

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Row by row the scale and zero point of the candidate of least error."""
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for candidate in self.candidates:
            scale, zero = candidate.rows(rows, fmt, importance)
            column, shift = scale.unsqueeze(1), zero.to(rows).unsqueeze(1)
            codes = torch.round(rows / column).add_(shift).clamp_(fmt.qmin, fmt.qmax)
            error = (codes - shift).mul_(column).sub_(rows).square_()
            error = (error if importance is None else error * importance).sum(1)
            if best is None:
                best = scale, zero, error
            else:
                better = error < best[2]
                pairs = zip((scale, zero, error), best, strict=True)
                best = tuple(torch.where(better, new, old) for new, old in pairs)  # type: ignore[assignment]
        assert best is not None
        return best[0], best[1]
