"""Least squares: the weights on the inputs that are left which best reproduce what the layer used to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.base import Moments


@dataclass(frozen=True)
class LeastSquares:
    """V = argmin E‖t − V x − b‖² + λ ‖V − P‖², λ = damping · mean(diag Cov x), with the intercept b free.

    In closed form V = (Cov(t, x) + λ P)(Cov(x) + λ I)⁻¹ and b = E[t] − V E[x]: ridge regression towards the weights P
    that the cut left. x are the inputs in the compressed model, where the layers before are compressed already, and
    t = W x₀ + δ with the inputs x₀ in the original, so that the errors of the layers before are corrected too (the
    asymmetric target of Li et al. 2025, arXiv:2504.02692, applied to structured pruning as in ZipLM,
    arXiv:2302.04089). Where the output is added to a stream, δ is the error that the stream brings along, original
    less compressed, so that the sum comes out right; δ = 0 elsewhere.

    damping: the ridge as a fraction of the inputs' mean variance.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"LeastSquares(damping={self.damping!r}): expected a positive number.")

    def __call__(self, prior: Tensor, moments: Moments, centre: bool) -> tuple[Tensor, Tensor]:
        """(V [out, d], shift b of the original's bias [out]), float64.

        prior: P, [out, d]. centre: whether the layer has a bias, or a batch norm that takes the mean, so that the
        intercept is free; if not, second moments about zero are used and the shift is zero.
        """
        p = prior.double()
        gram, cross = moments.gram, moments.cross
        if centre:
            gram = gram - torch.outer(moments.mean, moments.mean)
            cross = cross - torch.outer(moments.mean_target, moments.mean)
        mean_variance = float(gram.diagonal().mean())
        if mean_variance <= 0:  # inputs that never vary say nothing about the weights
            return p, torch.zeros(len(p), dtype=p.dtype)
        ridge = self.damping * mean_variance
        system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        v = torch.linalg.solve(system, (cross + ridge * p).T).T
        if not centre:
            return v, torch.zeros(len(p), dtype=p.dtype)
        return v, moments.mean_target - v @ moments.mean
