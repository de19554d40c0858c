"""GPTQ: against the algorithm as published, against all roundings of small layers, and its promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gracile.errors import ConfigError
from gracile.solvers import GPTQ, RoundingProblem
from gracile.solvers.gptq import column_order
from gracile.solvers.nearest_plane import nearest_plane
from gracile.solvers.rounding import nearest
from tests.solvers.rounding_problems import UniformGrid, layer, least_losses


def published(weight: NDArray[np.float64], hessian: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """Algorithm 1 of arXiv:2210.17323 with blocks of one column: the upper Cholesky factor of the inverse."""
    w, columns = weight.copy(), weight.shape[1]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scale = np.abs(weight).max(1) / (2 ** (bits - 1) - 1)
    found = np.zeros_like(w)
    for j in range(columns):
        found[:, j] = np.clip(np.round(w[:, j] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        error = (w[:, j] - found[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_sweep_is_the_published_one(bits: int) -> None:
    weight, problem = layer(bits, 12, 40)
    found = GPTQ(order="given", polish=0, rounds=1, beam=1, block=16)(weight, problem, UniformGrid(bits))
    expected = published(weight.numpy(), problem.metric.numpy(), bits)
    worse = problem.loss(torch.from_numpy(expected)) > found.nearest_loss  # these rows are rounded to nearest
    assert np.abs(found.weight.numpy() - expected)[~worse.numpy()].max() < 1e-9


@pytest.mark.parametrize(("bits", "width"), [(2, 7), (3, 6), (4, 5)])
def test_it_comes_near_the_best_of_all_roundings(bits: int, width: int) -> None:
    ratios, one, plain = [], [], []
    for seed in range(12):
        weight, problem = layer(seed, 4, width)
        grid = UniformGrid(bits)
        found = GPTQ()(weight, problem, grid)
        best = least_losses(problem, found.scale[:, 0], grid)
        assert bool((found.loss >= best * (1 - 1e-9)).all())
        ratios.append(float(found.loss.sum() / best.sum()))
        one.append(float(GPTQ(beam=1, polish=0, rounds=1)(weight, problem, grid).loss.sum() / best.sum()))
        plain.append(float(found.nearest_loss.sum() / best.sum()))
    assert np.mean(ratios) < 1.05
    assert np.mean(one) > 1.1 and np.mean(plain) > 1.5  # the layers are not such that anything does


@pytest.mark.parametrize("grid", [UniformGrid(3), UniformGrid(3, 8), UniformGrid(2, 12, symmetric=False)])
def test_blocks_change_nothing_but_the_time(grid: UniformGrid) -> None:
    weight, problem = layer(3, 6, 44)
    results = [GPTQ(block=block)(weight, problem, grid) for block in (1, 5, 8, 44, 128)]
    for other in results[1:]:
        assert torch.allclose(other.weight, results[0].weight, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "shared"), [(None, False), (None, True), (8, False), (12, False)])
def test_every_sweep_of_the_descent_lowers_the_loss(group: int | None, shared: bool, symmetric: bool) -> None:
    weight, problem = layer(4, 10, 40)
    grid = UniformGrid(3, group, shared, symmetric)
    losses = [GPTQ(polish=n, rounds=1, beam=1)(weight, problem, grid).loss for n in range(5)]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(losses[-1].sum()) < 0.99 * float(losses[0].sum())


@pytest.mark.parametrize("group", [None, 8, 7])
def test_the_weight_lies_on_the_grid_it_returns(group: int | None) -> None:
    weight, problem = layer(5, 6, 40)
    grid = UniformGrid(3, group, symmetric=False)
    found = GPTQ()(weight, problem, grid)
    size = group or 40
    scale, zero = (t.repeat_interleave(size, -1)[:, :40] for t in (found.scale, found.zero))
    units = found.weight / scale
    assert torch.allclose(units, units.round(), atol=1e-9)
    assert bool((units.round() >= -zero).all() and (units.round() <= grid.top - zero).all())
    assert torch.allclose(problem.loss(found.weight), found.loss)


def test_no_row_is_worse_than_rounded_to_nearest() -> None:
    for seed in range(10):
        weight, problem = layer(seed, 8, 12)
        for grid in (UniformGrid(2), UniformGrid(2, 4), UniformGrid(3, shared=True)):
            found = GPTQ(polish=0)(weight, problem, grid)
            assert bool((found.loss <= nearest(weight, problem, grid).loss).all())


def test_inputs_apart_from_each_other_are_rounded_to_nearest() -> None:
    weight, _ = layer(6, 5, 16)
    problem = RoundingProblem(weight, torch.diag(torch.rand(16, dtype=torch.float64) + 0.5))
    found = GPTQ(polish=0, rounds=1)(weight, problem, UniformGrid(4))
    assert torch.equal(found.weight, nearest(weight, problem, UniformGrid(4)).weight)


@pytest.mark.parametrize("grid", [UniformGrid(3), UniformGrid(3, 8, symmetric=False)])
def test_what_was_pruned_stays_zero_and_the_others_make_it_good(grid: UniformGrid) -> None:
    weight, problem = layer(8, 6, 40)
    zeros = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    pruned = weight.masked_fill(zeros, 0.0)
    found = GPTQ()(pruned, RoundingProblem(weight, problem.metric, zeros), grid)
    assert bool((found.weight[zeros] == 0).all()) and bool((found.weight[~zeros] != 0).any())
    assert bool((found.loss <= found.nearest_loss).all()) and float(found.loss.sum()) < 0.8 * float(
        problem.loss(pruned).sum()
    )


def test_groups_of_a_convolution_are_solved_each_by_itself() -> None:
    weight, problem = layer(7, 3, 9, groups=5)
    found = GPTQ()(weight, problem, UniformGrid(3))
    for i in range(5):
        alone = GPTQ()(weight[i], RoundingProblem(problem.target[i], problem.metric[i]), UniformGrid(3))
        assert torch.allclose(found.weight[i], alone.weight, atol=1e-9)


def test_the_order_keeps_groups_together_and_a_short_one_last() -> None:
    metric = torch.diag(torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 0.5, 7.0, 8.0]))
    assert column_order(metric, 8).tolist() == [4, 7, 6, 1, 3, 2, 0, 5]
    assert column_order(metric, 3).tolist() == [4, 3, 5, 1, 2, 0, 7, 6]
    assert column_order(metric, 4).tolist() == [4, 7, 6, 5, 1, 3, 2, 0]


@pytest.mark.parametrize(
    "settings", [{"order": "random"}, {"damping": 0}, {"asymmetry": 1.5}, {"polish": -1}, {"beam": 0}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="GPTQ"):
        GPTQ(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("group", [None, 8])
def test_the_loss_added_up_along_the_sweep_is_that_of_the_weight(beam: int, group: int | None) -> None:
    _, problem = layer(6, 5, 40)
    found, loss = nearest_plane(problem, UniformGrid(3, group), 16, beam)
    torch.testing.assert_close(loss, problem.loss(found.weight.mT))
