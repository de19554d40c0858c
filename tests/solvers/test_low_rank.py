"""Low rank: against the singular value decomposition, brute force and scikit-learn, and its promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gracile.errors import ConfigError, DataError
from gracile.solvers import LeastSquares, LowRank, Moments
from gracile.solvers.base import Factors
from gracile.solvers.low_rank import squared_error, symmetric, target_energy

#: A ridge so small that it changes nothing that these tests can see: 1e-10 of the variance, on condition numbers < 1e4.
NONE = LowRank(damping=1e-10)


def moments_of(target: Tensor, x: Tensor) -> Moments:
    """target: [n, out], x: [n, d], float64."""
    n = len(x)
    return Moments(x.T @ x / n, target.T @ x / n, x.mean(0), target.mean(0), target.square().mean(0))


def data(seed: int, outputs: int = 4, inputs: int = 6, n: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the original [n, d], inputs now [n, d], weight [out, d]; correlated, and not centred."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x0 = torch.randn(n, inputs, generator=generator, dtype=torch.float64) @ mixing + 1.5
    x = x0 + 0.3 * torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x0, x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def error_by(factors: Factors, moments: Moments) -> float:
    return squared_error(factors.product, factors.shift, moments)


def error_of(a: np.ndarray, b: np.ndarray, x: Tensor, target: Tensor) -> float:
    """Mean over rows of ‖t − A x − b‖², row by row."""
    return float(((target.numpy() - x.numpy() @ a.T - b) ** 2).sum(1).mean())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_of_a_weight_and_its_own_outputs_it_is_the_decomposition_of_the_whitened_weight(rank: int) -> None:
    _, x, weight = data(0)
    factors = NONE(weight, symmetric(weight, x.T @ x / len(x), x.mean(0)), False).factors(rank)
    values, vectors = np.linalg.eigh((x.T @ x / len(x)).numpy())  # C^½ by eigenvalues, no Cholesky factor
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u, s, v = np.linalg.svd(weight.numpy() @ root)
    wanted = (u[:, :rank] * s[:rank]) @ v[:rank] @ inverse
    assert np.abs(factors.product.numpy() - wanted).max() < 1e-7  # the ridge of 1e-10 times the condition number
    assert torch.count_nonzero(factors.shift) == 0


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_it_is_reduced_rank_regression_with_an_intercept(rank: int) -> None:
    """The textbook way: ordinary least squares of scikit-learn, its fitted values projected on their leading
    principal components."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    decomposition = pytest.importorskip("sklearn.decomposition")
    x0, x, weight = data(1)
    target = x0 @ weight.T
    factors = NONE(weight, moments_of(target, x), True).factors(rank)
    ols = linear_model.LinearRegression().fit(x.numpy(), target.numpy())
    fitted = ols.predict(x.numpy())
    wanted = decomposition.PCA(rank).fit(fitted)
    found = x.numpy() @ factors.product.numpy().T + factors.shift.numpy()
    assert np.abs(found - wanted.inverse_transform(wanted.transform(fitted))).max() < 1e-6


@pytest.mark.parametrize("centre", [True, False])
def test_what_a_rank_costs_are_the_energies_left_out(centre: bool) -> None:
    x0, x, weight = data(2)
    target = x0 @ weight.T
    moments = moments_of(target, x)
    found = NONE(weight, moments, centre)
    errors = [error_of(f.product.numpy(), f.shift.numpy(), x, target) for f in map(found.factors, range(1, 5))]
    left_out = [float(found.energies[rank:].sum()) for rank in range(1, 5)]
    assert np.allclose(errors, errors[-1] + np.array(left_out), rtol=1e-7)
    for rank, error in zip(range(1, 5), errors):
        assert error_by(found.factors(rank), moments) == pytest.approx(error, rel=1e-9)
    about = target - target.mean(0) if centre else target
    assert target_energy(moments, centre) == pytest.approx(float(about.square().sum(1).mean()), rel=1e-9)


@pytest.mark.parametrize("centre", [True, False])
def test_no_descent_from_random_factors_finds_less_of_the_objective(centre: bool) -> None:
    x0, x, weight = data(3)
    target, damping, rank = x0 @ weight.T, 0.05, 2
    varied = x - x.mean(0) if centre else x
    ridge = damping * float(varied.square().mean(0).mean())

    def objective(a: Tensor, b: Tensor) -> Tensor:
        return (target - x @ a.T - b).square().sum(1).mean() + ridge * (a - weight).square().sum()

    solved = LowRank(damping)(weight, moments_of(target, x), centre).factors(rank)
    ours = float(objective(solved.product, solved.shift))
    best = min(_descend(objective, rank, centre, seed) for seed in range(4))
    assert ours <= best * (1 + 1e-12)
    assert ours == pytest.approx(best, rel=1e-6)  # descent gets there, so that the bound above says something


def _descend(objective: Callable[[Tensor, Tensor], Tensor], rank: int, centre: bool, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    second, first, shift = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, rank), (rank, 6), 4))
    shift = shift if centre else torch.zeros(4, dtype=torch.float64)
    parts = [p.requires_grad_(True) for p in ((second, first, shift) if centre else (second, first))]
    optimizer = torch.optim.LBFGS(parts, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(second @ first, shift)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return float(closure().detach())


def test_plain_and_whitened_decompositions_are_no_better_on_its_own_objective() -> None:
    x0, x, weight = data(4)
    target = x0 @ weight.T
    moments = moments_of(target, x)
    for rank in (1, 2, 3):
        fitted = NONE(weight, moments, True).factors(rank)
        whitened = NONE(weight, symmetric(weight, moments.gram, moments.mean), True).factors(rank)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        product = (u[:, :rank] * s[:rank]) @ v[:rank]
        plain = Factors(s[:rank, None] * v[:rank], u[:, :rank], product, moments.mean_target - product @ moments.mean)
        errors = [error_by(factors, moments) for factors in (fitted, whitened, plain)]
        assert errors[0] < 0.999 * min(errors[1:])


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(4, 6), (9, 5)])
def test_of_full_rank_it_is_least_squares(centre: bool, outputs: int, inputs: int) -> None:
    x0, x, weight = data(5, outputs, inputs)
    moments = moments_of(x0 @ weight.T, x)
    found = LowRank(damping=0.02)(weight, moments, centre)
    factors = found.factors(min(outputs, inputs))
    solved, shift = LeastSquares(damping=0.02)(weight, moments, centre)
    assert torch.allclose(factors.product, solved, atol=1e-10) and torch.allclose(factors.shift, shift, atol=1e-9)
    assert torch.allclose(factors.second.T @ factors.second, torch.eye(min(outputs, inputs), dtype=torch.float64))
    assert bool((found.energies.diff() <= 0).all())


def test_constant_inputs_leave_the_decomposition_of_the_weight_and_a_shift_that_makes_up_for_it() -> None:
    _, _, weight = data(6)
    x = torch.full((50, 6), 2.0, dtype=torch.float64)
    factors = LowRank()(weight, moments_of(x @ weight.T, x), True).factors(2)
    u, s, v = np.linalg.svd(weight.numpy())
    assert np.abs(factors.product.numpy() - (u[:, :2] * s[:2]) @ v[:2]).max() < 1e-12
    assert torch.allclose(x @ factors.product.T + factors.shift, x @ weight.T, atol=1e-12)


@pytest.mark.parametrize("case", ["fewer rows than inputs", "equal inputs", "a dead input", "all zero"])
def test_degenerate_inputs_give_finite_factors_of_no_more_error_than_the_best_plain_ones(case: str) -> None:
    _, x, weight = data(7, n=3 if case == "fewer rows than inputs" else 300)
    if case == "equal inputs":
        x = x[:, :1].expand(-1, 6).clone()
    elif case == "a dead input":
        x[:, 2] = 0
    elif case == "all zero":
        x = torch.zeros_like(x)
    target = x @ weight.T
    moments = moments_of(target, x)
    factors = LowRank()(weight, moments, False).factors(2)
    assert all(bool(torch.isfinite(t).all()) for t in (factors.first, factors.second, factors.shift))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    thin, wide = s[:2, None] * v[:2], u[:, :2]
    plain = Factors(thin, wide, wide @ thin, torch.zeros(4, dtype=torch.float64))
    assert error_by(factors, moments) <= error_by(plain, moments) + 1e-12


def test_moments_that_rounding_made_indefinite_are_damped_until_they_are_a_covariance() -> None:
    x0, x, weight = data(9)
    moments = moments_of(x0 @ weight.T, x)
    values, vectors = torch.linalg.eigh(moments.gram)
    values[0] = -0.2 * values.mean()  # twenty times what the damping adds
    broken = Moments((vectors * values) @ vectors.T, moments.cross, moments.mean, moments.mean_target)
    factors = LowRank(damping=0.01)(weight, broken, False).factors(3)
    assert bool(torch.isfinite(factors.product).all())
    assert float(factors.product.abs().max()) < 100 * float(weight.abs().max())


def test_single_precision_weights_are_solved_in_double() -> None:
    x0, x, weight = data(8)
    factors = LowRank()(weight.float(), moments_of(x0 @ weight.T, x), True).factors(3)
    assert {factors.first.dtype, factors.second.dtype, factors.shift.dtype} == {torch.float64}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    x0, x, weight = data(10)
    x[0, 0] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        LowRank()(weight, moments_of(x0 @ weight.T, x), True)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_a_damping_that_is_no_positive_number_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="positive number"):
        LowRank(damping)
