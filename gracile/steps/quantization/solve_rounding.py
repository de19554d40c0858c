"""One weight given to a rounding solver: its problem from moments, its codes, and the mean that is left to a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.solvers import Moments, RoundingSolver
from gracile.solvers.rounding import Rounded, RoundingProblem, better_rows, rounding_problem
from gracile.steps.quantization.grids import FormatGrid

#: How often a grid that is more than scales is fitted to the codes, and the weight rounded to it again.
REFITS = 3


@dataclass(frozen=True)
class LayerRounding:
    """One layer's loss as a share of what rounding to nearest leaves (`gain`) and of its outputs' squares (`error`).

    raised: how often the damping grew tenfold.
    """

    gain: float
    error: float
    raised: int


@dataclass(frozen=True)
class Solved:
    """A weight [(groups,) out, d] on its grid.

    prior, moments, asymmetry: what it was solved from. problem, grid, rounded: what the solver was given, and gave.
    """

    prior: Tensor
    moments: Moments
    asymmetry: float
    problem: RoundingProblem
    grid: FormatGrid
    rounded: Rounded

    def encode(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of a layer's weight of this shape."""
        rounded = self.rounded
        return self.grid.encode_rows(rounded.weight, rounded.scale, rounded.zero, shape)

    def shift(self, decoded: Tensor) -> Tensor:
        """[all outputs] float64, what the bias gains: the mean of the target less that of the decoded weight."""
        mean, decoded = self.moments.mean.unsqueeze(-1), decoded.reshape(self.prior.shape)
        target = self.asymmetry * self.moments.mean_target
        target = target + (1 - self.asymmetry) * (self.prior @ mean).squeeze(-1)
        return (target - (decoded @ mean).squeeze(-1)).flatten()


def rounding_of(weights: Sequence[Solved]) -> LayerRounding:
    """How a layer of these weights came out, their losses added up; a weight of zeros has its outputs' squares."""
    loss = sum(float(w.rounded.loss.sum()) for w in weights)
    nearest = sum(float(w.rounded.nearest_loss.sum()) for w in weights)
    signal = sum(float(w.problem.loss(torch.zeros_like(w.problem.target)).sum()) for w in weights)
    raised = max(w.problem.raised for w in weights)
    return LayerRounding(loss / max(nearest, 1e-300), loss / max(signal, 1e-300), raised)


def solve_rounding(
    name: str, prior: Tensor, moments: Moments, centred: bool, solver: RoundingSolver, grid: FormatGrid
) -> Solved:
    """Round a weight to the grid by what its layer's outputs lose.

    name: of the layer, for errors. prior: [(groups,) out, d] float64, the weight as it was. moments: of its inputs and
    targets. centred: whether a bias takes up the mean. A grid that is more than scales is fitted to the weight first,
    and then to its codes, in turn with rounding; the loss only falls. Raises DataError where the solver's weight is not
    finite.
    """
    problem = rounding_problem(prior, moments, centred, solver.damping, solver.asymmetry)
    grid = grid.fitted(prior, problem)
    rounded = solver(prior, problem, grid)
    for _ in range(REFITS):
        refitted = grid.refitted(rounded.weight, problem)
        if refitted is None:
            break
        grid, weight = refitted
        moved = replace(rounded, weight=weight, loss=problem.loss(weight))
        rounded = better_rows(solver(prior, problem, grid), moved)
    if not bool(torch.isfinite(rounded.weight).all()):
        raise DataError(f"Layer '{name}' {tuple(prior.shape)}: its rounded weight is not finite.")
    return Solved(prior, moments, solver.asymmetry, problem, grid, rounded)
