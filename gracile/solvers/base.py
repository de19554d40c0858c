"""What a repair of a layer's weight reads: the moments of its inputs, in the original and in the compressed model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded inputs over N tokens or positions, all float64.

    gram: [d, d], (1/N) Σ x xᵀ of the inputs in the compressed model.
    cross: [d_original, d], (1/N) Σ x₀ xᵀ, x₀ being the original's input at the same token.
    mean: [d], of x. mean_original: [d_original], of x₀.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    mean_original: Tensor
