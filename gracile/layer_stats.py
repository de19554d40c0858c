"""What calibration measured about one layer: the record that criteria, ranges and repairs read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in equal bins over [low, high].

    counts: [bins] float64. low, high: the range covered, widened by doubling as values arrived.
    minimum, maximum: the exact extremes seen (inside [low, high]). extremes: those of each tensor that came, in order.
    """

    counts: Tensor
    low: float
    high: float
    minimum: float
    maximum: float
    extremes: tuple[tuple[float, float], ...]

    def share_outside(self, low: float, high: float) -> float:
        """Fraction of the values below `low` or above `high`, told by the middles of their bins."""
        bins = len(self.counts)
        total = float(self.counts.sum())
        middles = self.low + (self.high - self.low) * (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        return float(self.counts[(middles < low) | (middles > high)].sum()) / total if total else 0.0


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer; a field is None unless some step asked for it by name.

    input, output: histogram of all values of the layer's input / output over the calibration data.
    input_mean: [d] float64, mean over tokens or positions, d = in-features, or in/groups·kh·kw·groups unfolded inputs.
    input_sq_mean: [d] float64, mean of squares. input_abs_mean: [d] float64, mean of absolute values.
    input_peak: [in] float32, max|x| of each input channel of a linear layer.
    input_rows: [n, in] float32, a few hundred inputs of a linear layer, evenly spread over the calibration data.
    gram: [groups, d/groups, d/groups] float64 or float32, H = (2/N) Σ x xᵀ over N tokens or positions.
    output_mean: [out] float64, mean of the output per channel.
    gradient: shape of the weight, float32, dL/dw averaged over examples.
    gradient_sq: shape of the weight, float32, (dL/dw)² of single examples averaged over examples: the diagonal of
        the empirical Fisher matrix.
    hessian_diagonal: shape of the weight, float32, Hutchinson's estimate of d²L/dw² averaged over batches.
    examples: how many examples (gradients) or tokens (activations) the averages stand on.
    """

    input: Histogram | None = None
    output: Histogram | None = None
    input_mean: Tensor | None = None
    input_sq_mean: Tensor | None = None
    input_abs_mean: Tensor | None = None
    input_peak: Tensor | None = None
    input_rows: Tensor | None = None
    gram: Tensor | None = None
    output_mean: Tensor | None = None
    gradient: Tensor | None = None
    gradient_sq: Tensor | None = None
    hessian_diagonal: Tensor | None = None
    examples: int = field(default=0)


#: Names that a criterion, a range or a repair may ask for, and what they need from the data.
ACTIVATION_STATS = frozenset({"input", "output", "input_mean", "input_sq_mean", "gram", "output_mean"}) | frozenset(
    {"input_abs_mean", "input_peak", "input_rows"}
)
GRADIENT_STATS = frozenset({"gradient", "gradient_sq", "hessian_diagonal"})
#: The same of whole units instead of single weights; see `gracile.criteria.Units`.
GATE_STATS = frozenset({"gate_gradient_sq"})
