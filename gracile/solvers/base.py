"""What a repair of a layer's weight reads: the moments of its inputs and of what it should make of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded inputs x over N tokens or positions, all float64.

    gram: [d, d], (1/N) Σ x xᵀ. cross: [out, d], (1/N) Σ t xᵀ, t being what the layer should give for the same token,
    its bias not counted: W x₀ of the original, plus the error of a stream that the output is added to.
    mean: [d], of x. mean_target: [out], of t. square_target: [out], (1/N) Σ t², or None where it is not known.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    mean_target: Tensor
    square_target: Tensor | None = None

    def keep(self, columns: Tensor) -> Moments:
        """The moments of a layer that reads only these of the d inputs."""
        gram = self.gram[columns][:, columns]
        return Moments(gram, self.cross[:, columns], self.mean[columns], self.mean_target, self.square_target)
