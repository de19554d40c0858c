"""One weight given to a rounding solver: its problem from moments, its codes, and the mean that is left to a bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.formats import Int, Levels
from gracile.nn import QuantizedLayer
from gracile.solvers import Grid, Moments, RoundingSolver
from gracile.solvers.rounding import Rounded, RoundingProblem, rounding_problem


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

    prior, moments, asymmetry: what it was solved from. problem, rounded: what the solver was given, and gave.
    """

    prior: Tensor
    moments: Moments
    asymmetry: float
    problem: RoundingProblem
    rounded: Rounded

    def encode(self, layer: QuantizedLayer) -> dict[str, Tensor]:
        """The tensors of the layer's weight."""
        fmt, rounded = layer.weight_format, self.rounded
        assert isinstance(fmt, (Int, Levels))
        shape = fmt.scale_shape(layer.weight_shape)
        scale, zero = (t.flatten()[: math.prod(shape)].reshape(shape).float() for t in (rounded.scale, rounded.zero))
        weight = rounded.weight.reshape(layer.weight_shape).float()
        if isinstance(fmt, Levels) or fmt.symmetric:
            return fmt.encode(weight, scale)
        return fmt.encode(weight, scale, zero.to(torch.int16))

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
    name: str, prior: Tensor, moments: Moments, centred: bool, solver: RoundingSolver, grid: Grid
) -> Solved:
    """Round a weight to the grid by what its layer's outputs lose.

    name: of the layer, for errors. prior: [(groups,) out, d] float64, the weight as it was. moments: of its inputs and
    targets. centred: whether a bias takes up the mean. Raises DataError where the solver's weight is not finite.
    """
    problem = rounding_problem(prior, moments, centred, solver.damping, solver.asymmetry)
    rounded = solver(prior, problem, grid)
    if not bool(torch.isfinite(rounded.weight).all()):
        raise DataError(f"Layer '{name}' {tuple(prior.shape)}: its rounded weight is not finite.")
    return Solved(prior, moments, solver.asymmetry, problem, rounded)
