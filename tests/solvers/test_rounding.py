"""The rounding problem: its target against an explicit regression, and inputs that say little or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import DataError
from gracile.solvers import GPTQ, Moments
from gracile.solvers.rounding import rounding_problem
from tests.solvers.rounding_problems import UniformGrid


def moments_of(t: torch.Tensor, x: torch.Tensor) -> Moments:
    return Moments(x.mT @ x / x.shape[-2], t.mT @ x / x.shape[-2], x.mean(-2), t.mean(-2))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("asymmetry", [0.0, 0.5, 1.0])
def test_the_target_is_the_regression_on_the_mixed_outputs(asymmetry: float, centre: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(300, 6, generator=generator, dtype=torch.float64) + 1
    x = x0 + 0.3 * torch.randn(300, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    problem = rounding_problem(weight, moments_of(x0 @ weight.T, x), centre, 0.05, asymmetry)
    a, t = x.numpy(), (asymmetry * x0 @ weight.T + (1 - asymmetry) * x @ weight.T).numpy()
    if centre:
        a, t = a - a.mean(0), t - t.mean(0)
    ridge = np.sqrt(0.05 * (a**2).mean(0).mean() * len(a))
    stacked, wanted = np.vstack([a, ridge * np.eye(6)]), np.vstack([t, ridge * weight.numpy().T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    assert np.abs(problem.target.numpy() - expected).max() < 1e-9  # two float64 solutions of one system
    # What another weight costs beyond the best: the loss of the problem, to a constant of the data.
    other = expected + 0.1
    excess = ((stacked @ other.T - wanted) ** 2).sum(0) - ((stacked @ expected.T - wanted) ** 2).sum(0)
    assert np.allclose(problem.loss(torch.from_numpy(other)).numpy() * len(a), excess, rtol=1e-8)


def test_inputs_that_never_vary_leave_the_weight_to_the_nearest_code() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.zeros(20, 5, dtype=torch.float64)
    problem = rounding_problem(weight, moments_of(x @ weight.T, x), False, 0.01, 1.0)
    assert torch.equal(problem.target, weight) and torch.equal(problem.metric, torch.eye(5, dtype=torch.float64))
    grid = UniformGrid(8)
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(GPTQ(polish=0, rounds=1)(weight, problem, grid).weight, torch.round(weight / scale) * scale)


def test_one_example_and_dead_inputs_are_enough() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.tensor([[1.0, 0, 0, 2, 0, 3]], dtype=torch.float64)
    problem = rounding_problem(weight, moments_of(x @ weight.T, x), False, 0.01, 0.5)
    assert torch.allclose(problem.target[:, [1, 2, 4]], weight[:, [1, 2, 4]])
    found = GPTQ()(weight, problem, UniformGrid(4))
    assert bool(torch.isfinite(found.weight).all()) and bool((found.loss <= found.nearest_loss).all())


def test_moments_that_rounding_made_indefinite_are_damped_until_they_have_a_factor() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64)
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))
    moments = Moments(gram, weight @ gram, torch.zeros(3), torch.zeros(2))
    metric = rounding_problem(weight, moments, False, 0.01, 0.0).metric
    assert bool((torch.linalg.eigvalsh(metric) > 0).all())
    assert float(metric[0, 0]) == pytest.approx(6)  # λ grew tenfold from .005 to 5; at .5 there is no factor yet


def test_moments_that_are_not_finite_are_refused() -> None:
    gram = torch.full((2, 2), float("nan"), dtype=torch.float64)
    moments = Moments(gram, torch.zeros(1, 2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(DataError, match="NaN"):
        rounding_problem(torch.ones(1, 2), moments, False, 0.01, 0.5)
