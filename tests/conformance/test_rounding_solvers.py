"""What every rounding solver promises; all members have to be here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gracile.solvers
from gracile.solvers import GPTQ, AdaRound, RoundingProblem, RoundingSolver, SignRound
from tests.solvers.rounding_problems import UniformGrid, layer

MEMBERS: list[RoundingSolver] = [
    GPTQ(),
    GPTQ(beam=1, polish=0, rounds=1),
    AdaRound(iterations=60, learning_rate=0.1),
    AdaRound(iterations=60, learning_rate=0.1, start=None),
    SignRound(iterations=60),
    SignRound(iterations=60, start=None),
]
GRIDS = [UniformGrid(3), UniformGrid(4, 8), UniformGrid(2, 12, symmetric=False), UniformGrid(3, shared=True)]
every_member = pytest.mark.parametrize("solver", MEMBERS, ids=str)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def test_every_solver_is_tested() -> None:
    classes = [getattr(gracile.solvers, name) for name in gracile.solvers.__all__]
    solvers = {c for c in classes if issubclass(c, RoundingSolver) and not inspect.isabstract(c)}
    assert solvers == {type(member) for member in MEMBERS}


@every_grid
@every_member
def test_no_row_is_worse_than_rounded_to_nearest(solver: RoundingSolver, grid: UniformGrid) -> None:
    weight, problem = layer(1, 9, 20)
    found = solver(weight, problem, grid)
    assert bool((found.loss <= found.nearest_loss * (1 + 1e-9)).all())
    assert float(found.loss.sum()) < float(found.nearest_loss.sum())
    torch.testing.assert_close(found.loss, problem.loss(found.weight))


@every_grid
@every_member
def test_the_weight_lies_on_the_grid_that_is_returned(solver: RoundingSolver, grid: UniformGrid) -> None:
    weight, problem = layer(2, 6, 20)
    found = solver(weight, problem, grid)
    group = grid.group or 20
    scale = found.scale.repeat_interleave(group, -1)[:, :20]
    codes = found.weight / scale + found.zero.repeat_interleave(group, -1)[:, :20]
    assert float((codes - codes.round()).abs().max()) < 1e-6
    assert codes.round().min() >= grid.bottom and codes.round().max() <= grid.top


@every_member
def test_pruned_weights_stay_zero(solver: RoundingSolver) -> None:
    weight, problem = layer(3, 8, 20)
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    weight = weight.masked_fill(zeros, 0.0)
    found = solver(weight, RoundingProblem(weight, problem.metric, zeros), UniformGrid(3))
    assert not bool(found.weight[zeros].any())


@every_member
def test_groups_of_a_convolution_are_rounded_apart(solver: RoundingSolver) -> None:
    weight, problem = layer(4, 5, 9, groups=3)
    found = solver(weight, problem, UniformGrid(3))
    assert found.weight.shape == weight.shape and found.loss.shape == weight.shape[:-1]
    assert bool((found.loss <= found.nearest_loss * (1 + 1e-9)).all())


@every_member
def test_a_weight_of_zeros_and_a_perfect_start_are_no_trouble(solver: RoundingSolver) -> None:
    _, problem = layer(5, 4, 12)
    nothing = torch.zeros(4, 12, dtype=torch.float64)
    found = solver(nothing, RoundingProblem(nothing, problem.metric), UniformGrid(3))
    assert not bool(found.weight.any()) and not bool(found.loss.any())


class NumbersComputed(TorchDispatchMode):
    """Counts the elements of all tensors that operators give: work, told alike by every machine however busy it is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


@every_member
def test_a_draft_has_most_of_the_gain_for_less_work(solver: RoundingSolver) -> None:
    weight, problem = layer(6, 64, 96)
    draft, grid = solver.draft(), UniformGrid(4)
    assert draft.draft() == draft and (draft.damping, draft.asymmetry) == (solver.damping, solver.asymmetry)
    work, found = {}, {}
    for each in (solver, draft):
        with NumbersComputed() as numbers:
            found[each] = each(weight, problem, grid)
        work[each] = numbers.count
    gains = {each: float((f.nearest_loss - f.loss).sum()) for each, f in found.items()}
    assert gains[draft] > 0.7 * gains[solver]
    assert draft == solver or work[draft] < 0.5 * work[solver]
