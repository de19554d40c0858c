"""MSE: the range whose clipping and rounding errors add up to least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats import Int
from gracile.layer_stats import Histogram
from gracile.ranges.base import Range, full_range, scale_and_zero

#: Weights scored at a time: the fastest of 2^14 to 2^22 when measured.
CHUNK = 1 << 19
#: How often, of all its ranges, a search of weights asks whether narrower ones can still be better.
LOOKS = 16


@dataclass(frozen=True)
class MSE(Range):
    """argmin over ranges T of Σ h_i |x_i − Q_T(x_i)|^power, T among `thresholds` equal fractions of [minimum, maximum].

    power: 2 is mean squared error; GPTQ clips weights with 2.4. The full range is one of the candidates, so the error
    is never above that of min-max (on the histogram, for activations). Of equal errors the wider range is taken. Where
    the scale of a weight may have either sign, both are tried.
    Source: the clipping search of OCTAV's and GPTQ's reference code, by exhaustion.
    """

    thresholds: int = 128
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.thresholds < 1:
            raise ConfigError(f"MSE(thresholds={self.thresholds}): at least 1 is needed.")
        if not self.power > 0:
            raise ConfigError(f"MSE(power={self.power}): must be positive.")

    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the best range: both ends shrunk together, then each on its own."""
        if histogram.minimum == histogram.maximum:
            return scale_and_zero(fmt, histogram.minimum, histogram.maximum)
        fractions = torch.arange(self.thresholds, 0, -1, dtype=torch.float64) / self.thresholds
        low = torch.tensor(min(histogram.minimum, 0.0), dtype=torch.float64)
        high = torch.tensor(max(histogram.maximum, 0.0), dtype=torch.float64)
        low, high = self._best(histogram, fmt, low * fractions, high * fractions)
        low, high = self._best(histogram, fmt, low.expand_as(fractions), high * fractions)
        low, high = self._best(histogram, fmt, low * fractions, high.expand_as(fractions))
        return scale_and_zero(fmt, low, high)

    def _best(self, histogram: Histogram, fmt: Int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        bins = len(histogram.counts)
        used = histogram.counts.nonzero().squeeze(1)
        values = histogram.low + (histogram.high - histogram.low) * (used.double() + 0.5) / bins
        scale, zero = (t.double().reshape(-1, 1) for t in scale_and_zero(fmt, low, high))
        codes = torch.round(values / scale).add_(zero).clamp_(fmt.qmin, fmt.qmax)
        errors = (values - (codes - zero) * scale).abs_().pow_(self.power) @ histogram.counts[used]
        best = int(errors.argmin())
        return low[best], high[best]

    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per row, the full-range scale times the best fraction, and of the better sign where it has one."""
        scale, zero = full_range(rows, fmt)
        length = max(1, CHUNK // rows.shape[1])
        counts = [None] * len(rows) if importance is None else importance.expand_as(rows).split(length)
        parts = zip(rows.split(length), scale.split(length), zero.split(length), counts)
        return torch.cat([self._best_scale(*part, fmt) for part in parts]), zero

    def _best_scale(self, rows: Tensor, full: Tensor, zero: Tensor, importance: Tensor | None, fmt: Int) -> Tensor:
        chosen, least = full, torch.full_like(full, float("inf"))
        shift = zero.float().reshape(-1, 1)
        ends: list[tuple[int, Any, Any]] = [(1, fmt.qmin - shift, fmt.qmax - shift)]
        reach = torch.maximum(shift - fmt.qmin, fmt.qmax - shift)  # of the longer side, in steps
        most = self.thresholds
        if fmt.signed_scale:
            ends = [(1, fmt.qmin, fmt.qmax), (-1, -fmt.qmax, -fmt.qmin)]
            # Turned over, the grid has its shorter side where the row reaches farther, and may need larger steps.
            most = math.ceil(self.thresholds * -fmt.qmin / fmt.qmax)
        narrower = range(self.thresholds - 1, 0, -1)
        looks = narrower[:: self.thresholds // LOOKS or 1]
        for step in (self.thresholds, *range(most, self.thresholds, -1), *narrower):
            scale = full * (step / self.thresholds)
            column = scale.reshape(-1, 1)
            if step in looks:
                clipped = self._sum((rows.abs() - reach * column.abs()).clamp_(min=0), importance)
                if bool((clipped >= least).all()):  # that alone is more, and in narrower ranges ever more
                    break
            nearest = torch.round(rows / column)
            for sign, low, high in ends[step > self.thresholds :]:
                error = self._sum(nearest.clamp(low, high).mul_(column).sub_(rows), importance)
                better = error < least
                chosen, least = torch.where(better, sign * scale, chosen), torch.where(better, error, least)
        return chosen

    def _sum(self, error: Tensor, importance: Tensor | None) -> Tensor:
        """Σ h |error|^power of each row; error is used up."""
        error = error.square_() if self.power == 2 else error.abs_().pow_(self.power)
        return (error if importance is None else error.mul_(importance)).sum(dim=1)
