"""All roundings up or down: against every combination written out, for rows with one scale and with several."""

from __future__ import annotations

import itertools

import pytest
import torch

from gracile.solvers import GPTQ
from gracile.solvers.enumeration import enumerate_roundings
from gracile.solvers.nearest_plane import Columns
from gracile.solvers.rounding import RoundingProblem
from tests.solvers.rounding_problems import UniformGrid, layer, least_losses


def start(problem: RoundingProblem, grid: UniformGrid) -> Columns:
    group = grid.group or problem.target.shape[-1]
    groups = -(-problem.target.shape[-1] // group)
    parts = [problem.target[..., i * group : (i + 1) * group] for i in range(groups)]
    fitted = [grid.fit(part, torch.ones(part.shape[-1]).to(part)) for part in parts]
    scale, zero = (torch.stack(each, -2) for each in zip(*fitted, strict=True))
    return Columns(torch.zeros_like(problem.target.mT), 1.013 * scale, zero, group)  # no target lies on the grid


@pytest.mark.parametrize("grid", [UniformGrid(3), UniformGrid(2, 2), UniformGrid(4, 3, symmetric=False)], ids=str)
def test_no_rounding_up_or_down_is_better(grid: UniformGrid) -> None:
    _, problem = layer(4, 3, 5)
    state = start(problem, grid)
    enumerate_roundings(state, problem, grid)
    found = problem.loss(state.weight.mT)
    scale = state.scale.repeat_interleave(state.group, -2)[:5].mT
    zero = state.zero.repeat_interleave(state.group, -2)[:5].mT
    units = problem.target / scale
    lowest, highest = grid.units(units - 99, scale / scale, zero), grid.units(units + 99, scale / scale, zero)
    for ups in itertools.product((0, 1), repeat=5):
        other = torch.minimum(torch.maximum(units.floor() + torch.tensor(ups), lowest), highest) * scale
        assert bool((found <= problem.loss(other) + 1e-12).all())


def test_a_row_that_is_better_already_stays() -> None:
    weight, problem = layer(1, 6, 5)
    grid = UniformGrid(3)
    best = GPTQ()(weight, problem, grid)
    units = (best.weight / best.scale).mT
    state = Columns(units.clone(), best.scale.mT, best.zero.mT, 5)
    enumerate_roundings(state, problem, grid)
    assert bool((problem.loss(state.weight.mT) <= best.loss + 1e-12).all())


def test_pruned_weights_stay_zero_and_groups_are_apart() -> None:
    weight, problem = layer(2, 2, 9)
    metric = torch.stack([problem.metric, 2 * problem.metric])
    zeros = torch.zeros(2, 2, 9, dtype=torch.bool)
    zeros[1, 0, 4] = True
    both = RoundingProblem(torch.stack([problem.target, problem.target]), metric, zeros)
    grid = UniformGrid(2)
    state = start(both, grid)
    enumerate_roundings(state, both, grid)
    assert state.units[1, 4, 0] == 0
    alone = start(problem, grid)
    enumerate_roundings(alone, problem, grid)
    assert torch.equal(state.units[0], alone.units)
    assert not torch.equal(weight, state.weight[0].mT)


@pytest.mark.parametrize(("bits", "width"), [(2, 6), (3, 5), (4, 4)])
def test_short_rows_are_rounded_as_well_as_can_be(bits: int, width: int) -> None:
    ratios = []
    for seed in range(8):
        weight, problem = layer(seed, 3, width)
        found = GPTQ()(weight, problem, UniformGrid(bits))
        ratios.append(float(found.loss.sum() / least_losses(problem, found.scale[:, 0], UniformGrid(bits)).sum()))
    assert sum(ratios) / len(ratios) < 1.005  # codes more than one step from the target remain
