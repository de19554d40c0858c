"""Spatial low rank: a convolution as one along a side of its kernel and one along the other, for the inputs it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.base import Factors, Moments, RidgeSolution, solve_ridge


@dataclass(frozen=True)
class SpatialDecomposition:
    """Weights of the form A[o, c, i, j] = Σ_ρ B[o, ρ, j] C[ρ, c, i], for every rank, float64.

    free: V, the solution of any form. solution [out, c·i·j], metric [c·i·j, c·i·j]: V and M with the columns in this
    order. start: [k, c·i], what C starts with, the leading row first. kernel: sizes of i and j. transposed: i is the
    second dimension of the layer's kernel. sweeps, steps: as in `SpatialLowRank`.
    """

    free: RidgeSolution
    solution: Tensor
    metric: Tensor
    start: Tensor
    kernel: tuple[int, int]
    transposed: bool
    sweeps: int
    steps: int

    def factors(self, rank: int) -> Factors:
        """first = C [r, c·i], second = B [out, r·j]; the product has its columns in the order of the layer's weight."""
        c = self.start[:rank].unflatten(1, (-1, self.kernel[0]))
        b = self._second(c)
        for _ in range(self.sweeps):
            c = self._first(b, c)
            b = self._second(c)
        weight = _composed(b, c)
        product = (weight.transpose(2, 3) if self.transposed else weight).flatten(1)
        return Factors(c.flatten(1), b.flatten(1), product, self.free.shift(product))

    def _second(self, c: Tensor) -> Tensor:
        """B, given C: least squares on what C makes of the inputs at each of the j places."""
        rank, places, flat = len(c), self.kernel[1], c.flatten(1)
        measured = torch.einsum("rm,mjd->rjd", flat, self.metric.unflatten(0, (-1, places))).flatten(0, 1)
        gram = torch.einsum("nmk,sm->nsk", measured.unflatten(1, (-1, places)), flat).flatten(1)
        gram.diagonal().add_(1e-10 * gram.diagonal().mean())  # two rows of C may say the same
        return torch.linalg.solve(gram, measured @ self.solution.T).T.unflatten(1, (rank, places))

    def _first(self, b: Tensor, c: Tensor) -> Tensor:
        """C, given B: conjugate gradients on its normal equations, from the present C on, which never do worse."""

        def adjoint(weight: Tensor) -> Tensor:
            """Bᵀ (W M), in the shape of C."""
            return torch.einsum("orj,ocij->rci", b, (weight @ self.metric).unflatten(1, (-1, *self.kernel)))

        residual = adjoint(self.solution - _composed(b, c).flatten(1))
        direction, energy = residual, residual.square().sum()
        for _ in range(self.steps):
            if float(energy) <= 0:
                break
            image = adjoint(_composed(b, direction).flatten(1))
            length = energy / (direction * image).sum()
            c, residual = c + length * direction, residual - length * image
            last, energy = energy, residual.square().sum()
            direction = residual + energy / last * direction
        return c


@dataclass(frozen=True)
class SpatialLowRank:
    """A_r = argmin E‖t − A x − b‖² + λ ‖A − P‖² over A[o, c, i, j] = Σ_ρ B[o, ρ, j] C[ρ, c, i], ρ ≤ r.

    With V and M as in `LowRank`, the objective is tr (A − V) M (A − V)ᵀ and a constant. C starts with the leading left
    singular vectors of V, as a matrix of (c, i) by (o, j), in the metric that M has for (c, i) on average over j. Given
    C, B is ordinary least squares; given B, C is improved by conjugate gradients. Both lower the objective, so that the
    result is no worse than the start.

    Source: filters separable in space and shared by all channels, scheme 2 of Jaderberg et al. 2014 (arXiv:1405.3866),
    known as spatial SVD. The metric of the inputs, the ridge towards P and targets of the original are ours.

    damping: the ridge as a fraction of the inputs' mean variance. sweeps: how often C and then B are improved. steps:
    of conjugate gradients in each.
    """

    damping: float = 0.01
    sweeps: int = 2
    steps: int = 15

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"SpatialLowRank(damping={self.damping!r}): expected a positive number.")
        for name, value in (("sweeps", self.sweeps), ("steps", self.steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"SpatialLowRank({name}={value!r}): expected a whole number of at least 0.")

    def __call__(
        self, prior: Tensor, moments: Moments, centre: bool, kernel: tuple[int, int], transposed: bool = False
    ) -> SpatialDecomposition:
        """The solutions for ranks up to min(in channels · i, out · j).

        prior: P, [out, d], d running over (channel, kernel row, kernel column). kernel: of the layer, (rows, columns).
        centre: as in `LowRank`. transposed: C runs over the kernel's columns and B over its rows, not the other way
        round. Raises DataError for moments that are not finite.
        """
        free = solve_ridge(prior, moments, centre, self.damping)
        solution, metric, sides = free.solution, free.metric, kernel
        if transposed:
            order = torch.arange(prior.shape[1]).unflatten(0, (-1, *kernel)).transpose(1, 2).flatten()
            solution, metric, sides = solution[:, order], metric[order][:, order], (kernel[1], kernel[0])
        blocks = metric.unflatten(1, (-1, *sides)).unflatten(0, (-1, *sides))
        marginal = torch.einsum("cijdkj->cidk", blocks).flatten(2).flatten(0, 1) / sides[1]
        root = torch.linalg.cholesky(marginal)
        basis, _, _ = torch.linalg.svd(root.T @ _by_side(solution.unflatten(1, (-1, *sides))), full_matrices=False)
        start = torch.linalg.solve_triangular(root.T, basis, upper=True).T
        return SpatialDecomposition(free, solution, metric, start, sides, transposed, self.sweeps, self.steps)


def left_out(weight: Tensor, rank: int, transposed: bool) -> float:
    """What of ‖W‖² a rank leaves out of a weight [out, channels, rows, columns], by its singular values alone."""
    matrix = _by_side(weight.double().transpose(2, 3) if transposed else weight.double())
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def _by_side(weight: Tensor) -> Tensor:
    """[out, c, i, j] as a matrix of (c, i) by (out, j)."""
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _composed(b: Tensor, c: Tensor) -> Tensor:
    """A [out, c, i, j] of B [out, r, j] and C [r, c, i]."""
    return torch.einsum("orj,rci->ocij", b, c)
