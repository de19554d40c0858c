"""Low rank: the best two thin matrices in place of a layer's weight, for the inputs that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.base import Factors, Moments, RidgeSolution, solve_ridge


@dataclass(frozen=True)
class Decomposition:
    """The solutions of every rank at once, float64.

    free: V, of full rank. basis: U [out, k], orthonormal, the directions of the outputs V x in descending order of
    energies [k], which say what each adds to the objective when it is left out.
    """

    free: RidgeSolution
    basis: Tensor
    energies: Tensor

    def factors(self, rank: int) -> Factors:
        """second = U_r, first = U_rᵀ V, shift = E[t] − U_r U_rᵀ V E[x]."""
        second = self.basis[:, :rank].contiguous()
        first = second.T @ self.free.solution
        product = second @ first
        return Factors(first, second, product, self.free.shift(product))


@dataclass(frozen=True)
class LowRank:
    """A_r = argmin over rank A of E‖t − A x − b‖² + λ ‖A − P‖², λ = damping · mean(diag Cov x), the intercept b free.

    With V, the solution without a bound on the rank (ridge regression towards the weight P that the layer has, as in
    `LeastSquares`), the objective is that of V plus tr (A − V)(Cov x + λ I)(A − V)ᵀ. Hence A_r = U_r U_rᵀ V, U_r being
    the r leading eigenvectors of V (Cov x + λ I) Vᵀ, and what rank r costs beyond V is the sum of the other
    eigenvalues. They are computed as squared singular values of V L with L Lᵀ = Cov x + λ I, whose condition number the
    ridge bounds by d / damping + 1; where rounding has made the moments indefinite, λ grows tenfold until there is L.

    Source: reduced-rank regression (Izenman 1975, doi:10.1016/0047-259X(75)90042-1, all outputs weighing the same). For
    targets t = P x it is the singular value decomposition of P Cov(x)^½, as in DRONE (Chen et al. 2021) and SVD-LLM
    (Wang et al. 2024, arXiv:2403.07378). The ridge towards P, and targets of the original for inputs of the compressed
    model, are ours.

    damping: the ridge as a fraction of the inputs' mean variance.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"LowRank(damping={self.damping!r}): expected a positive number.")

    def __call__(self, prior: Tensor, moments: Moments, centre: bool) -> Decomposition:
        """The solutions of all ranks up to min(out, d).

        prior: P, [out, d]. centre: whether the layer has a bias, or a batch norm that takes the mean, so that the
            intercept is free; if not, second moments about zero are used and the shift is zero.
        Inputs that never vary say nothing about the weights; their decomposition is that of P itself. Raises DataError
        for moments that are not finite.
        """
        free = solve_ridge(prior, moments, centre, self.damping)
        basis, values, _ = torch.linalg.svd(free.solution @ free.root, full_matrices=False)
        return Decomposition(free, basis, values.square())


def symmetric(weight: Tensor, gram: Tensor, mean: Tensor) -> Moments:
    """Moments with the target W x: what the weight makes of inputs with these second moments and this mean.

    Low rank of these is the decomposition of the weight itself, in the metric of its inputs.
    """
    w = weight.double()
    outputs = w @ gram
    return Moments(gram, outputs, mean, w @ mean, (outputs * w).sum(1))


def squared_error(weight: Tensor, shift: Tensor, moments: Moments) -> float:
    """E‖t − A x − b‖² of a weight A [out, d] and a shift b [out], for moments that hold the targets' squares."""
    assert moments.square_target is not None, "the moments do not say how large the targets are"
    a, b = weight.double(), shift.double()
    error = moments.square_target.sum() - 2 * (a * moments.cross).sum() + ((a @ moments.gram) * a).sum()
    error += b.square().sum() - 2 * b @ (moments.mean_target - a @ moments.mean)
    return max(0.0, float(error))


def target_energy(moments: Moments, centre: bool) -> float:
    """E‖t‖², about the mean where `centre`: what errors are shares of."""
    assert moments.square_target is not None, "the moments do not say how large the targets are"
    about = moments.mean_target.square() if centre else torch.zeros_like(moments.mean_target)
    return max(0.0, float((moments.square_target - about).sum()))
