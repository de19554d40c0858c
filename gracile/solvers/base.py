"""What solvers of a layer's weight read and give: moments of its inputs and targets, the free solution, two factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import DataError


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

    def of_group(self, index: int) -> Moments:
        """The moments of one group, where those of several have an axis of groups in front."""
        square = None if self.square_target is None else self.square_target[index]
        return Moments(self.gram[index], self.cross[index], self.mean[index], self.mean_target[index], square)


@dataclass(frozen=True)
class Factors:
    """Two thin matrices in place of a weight, and what the bias shifts by, all float64.

    first: [r, ·] and second: [out, ·], in the order of their layers' weights, flattened. product: [out, d], the weight
    that both are. shift: [out], added to the original's bias.
    """

    first: Tensor
    second: Tensor
    product: Tensor
    shift: Tensor


@dataclass(frozen=True)
class RidgeSolution:
    """V = argmin E‖t − V x − b‖² + λ ‖V − P‖², and the metric M = Cov x + λ I in which other weights are worse by
    tr (A − V) M (A − V)ᵀ; all float64.

    solution: V, [out, d]. metric: M, [d, d]. root: [d, d], lower triangular, M = root · rootᵀ. mean [d], mean_target
    [out]: of the inputs and targets that the intercept balances; both zero where none is allowed.
    """

    solution: Tensor
    metric: Tensor
    root: Tensor
    mean: Tensor
    mean_target: Tensor

    def shift(self, weight: Tensor) -> Tensor:
        """The best intercept b of a weight [out, d]: E[t] − A E[x]."""
        return self.mean_target - weight @ self.mean


def solve_ridge(prior: Tensor, moments: Moments, centre: bool, damping: float) -> RidgeSolution:
    """The best weight without a bound on its rank, λ = damping · mean(diag Cov x).

    prior: P, [out, d]. centre: whether the intercept is free; if not, second moments about zero are used. Where
    rounding has made the moments indefinite, λ grows tenfold until M has a Cholesky factor. Inputs that never vary say
    nothing: then V is P, and M the identity. Raises DataError for moments that are not finite.
    """
    if not bool(torch.isfinite(moments.gram).all() & torch.isfinite(moments.cross).all()):
        raise DataError("LowRank: the moments of a layer's inputs or outputs hold NaN or infinity.")
    p = prior.double()
    gram, cross, mean, mean_target = moments.gram, moments.cross, moments.mean, moments.mean_target
    if centre:
        gram, cross = gram - torch.outer(mean, mean), cross - torch.outer(mean_target, mean)
    else:
        mean, mean_target = torch.zeros_like(mean), torch.zeros_like(mean_target)
    ridge = damping * float(gram.diagonal().mean())
    identity = torch.eye(len(gram), dtype=gram.dtype)
    if ridge <= 0:
        return RidgeSolution(p, identity, identity, mean, mean_target)
    root, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    while bool(failed):  # sums of low precision, less a large mean, need not be a covariance
        ridge *= 10
        root, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    solution = torch.cholesky_solve((cross + ridge * p).T, root).T
    return RidgeSolution(solution, gram + ridge * identity, root, mean, mean_target)
