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
    residual: [out, d], (1/N) Σ δ xᵀ, and mean_residual: [out], of δ, the error of what the layer's output is added to,
        original less compressed; None where it is added to nothing.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    mean_original: Tensor
    residual: Tensor | None = None
    mean_residual: Tensor | None = None

    def keep(self, columns: Tensor) -> Moments:
        """The moments of a layer that reads only these of the d inputs."""
        residual = None if self.residual is None else self.residual[:, columns]
        gram, cross = self.gram[columns][:, columns], self.cross[:, columns]
        return Moments(gram, cross, self.mean[columns], self.mean_original, residual, self.mean_residual)
