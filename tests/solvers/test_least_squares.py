"""Least squares: the closed form against an explicit regression, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.solvers import LeastSquares, Moments


def moments_of(target: torch.Tensor, x: torch.Tensor) -> Moments:
    """target: [n, out], x: [n, d], float64."""
    return Moments(x.T @ x / len(x), target.T @ x / len(x), x.mean(0), target.mean(0))


def data(seed: int, kept: int = 5, outputs: int = 4, n: int = 400) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x0 = torch.randn(n, 8, generator=generator, dtype=torch.float64) @ mixing + 1.5
    x = x0[:, :kept] + 0.1 * torch.randn(n, kept, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, 8, generator=generator, dtype=torch.float64)
    return x0, x, weight, weight[:, :kept]


@pytest.mark.parametrize("centre", [True, False])
def test_it_is_ridge_regression_towards_the_prior(centre: bool) -> None:
    x0, x, weight, prior = data(0)
    solved, shift = LeastSquares(damping=0.05)(prior, moments_of(x0 @ weight.T, x), centre)
    a, target = x.numpy(), (x0 @ weight.T).numpy()
    if centre:
        a, target = a - a.mean(0), target - target.mean(0)
    ridge = 0.05 * (a**2).mean(0).mean() * len(a)
    stacked = np.vstack([a, np.sqrt(ridge) * np.eye(5)])
    wanted = np.linalg.lstsq(stacked, np.vstack([target, np.sqrt(ridge) * prior.numpy().T]), rcond=None)[0].T
    assert np.abs(solved.numpy() - wanted).max() < 1e-9  # two float64 solutions of a well-conditioned system
    intercept = (x0 @ weight.T).mean(0) - x.mean(0) @ solved.T if centre else torch.zeros(4, dtype=torch.float64)
    assert torch.allclose(shift, intercept, atol=1e-12)


def test_the_error_is_below_that_of_the_cut_weights() -> None:
    x0, x, weight, prior = data(1)
    solved, shift = LeastSquares()(prior, moments_of(x0 @ weight.T, x), True)
    target = x0 @ weight.T
    refitted = (x @ solved.T + shift - target).square().mean()
    cut = (x @ prior.T - target).square().mean()
    assert refitted < 0.5 * cut  # the inputs that went are correlated with those that stay


def test_with_nothing_cut_the_weights_stay() -> None:
    x0, _, weight, _ = data(2)
    solved, shift = LeastSquares()(weight, moments_of(x0 @ weight.T, x0), True)
    assert torch.allclose(solved, weight, atol=1e-9)
    assert torch.allclose(shift, torch.zeros(4, dtype=torch.float64), atol=1e-9)


def test_inputs_that_never_vary_leave_the_prior() -> None:
    x0, x, weight, prior = data(3)
    constant = torch.ones_like(x)
    solved, shift = LeastSquares()(prior, moments_of(torch.ones_like(x0) @ weight.T, constant), True)
    assert torch.equal(solved, prior)
    assert torch.allclose(shift, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0, -1, float("inf"), float("nan")])
def test_an_impossible_damping_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="damping"):
        LeastSquares(damping=damping)
