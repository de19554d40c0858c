"""What rounding solvers read and give: a quadratic problem in the weight, a grid, and a weight on the grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.solvers.base import Moments

#: Columns of a layer whose loss is summed at a time.
_BLOCK = 512
#: How often the damping may grow tenfold.
_RAISES = 16


class Grid(ABC):
    """Which numbers a weight may take: scale · u, u one of the units that the zero point of its group allows.

    group: how many consecutive columns of a row share a scale (the last group of a row may be shorter); None: all.
    shared: whether all rows share it too.
    """

    group: int | None
    shared: bool

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each [..., rows], for weights [..., rows, n] of one group.

        importance: [..., n], what a squared error in each column counts.
        """

    @abstractmethod
    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The u nearest to weight / scale; all of one shape, or such that broadcast."""

    @abstractmethod
    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        """The u next nearest on the other side of weight / scale than `unit`; `unit` itself where the grid ends."""

    def stored(self, scale: Tensor) -> Tensor:
        """The scale nearest to each that can be stored; any can unless a grid says otherwise."""
        return scale


@dataclass(frozen=True)
class RoundingProblem:
    """tr (Q − V) M (Q − V)ᵀ, to be made small by Q on a grid; all of one float dtype.

    target: V, [..., out, d], the weight that would be best without a grid. metric: M, [..., d, d], positive definite.
    Leading axes are the groups of a convolution. zeros: [..., out, d], weights that have to stay zero, which an earlier
    step pruned; None: there are none. raised: how often the damping had to grow tenfold before M was positive definite.
    """

    target: Tensor
    metric: Tensor
    zeros: Tensor | None = None
    raised: int = 0

    def loss(self, weight: Tensor) -> Tensor:
        """(Q − V) M (Q − V)ᵀ of each row, [..., out]."""
        error = weight - self.target
        width = error.shape[-1]
        total = error.new_zeros(error.shape[:-1])
        for start in range(0, width, _BLOCK):  # the metric is symmetric: half of it tells all
            stop = min(start + _BLOCK, width)
            part, rows = error[..., start:stop], self.metric[..., start:stop, :]
            product = part @ rows[..., start:stop] + 2 * (error[..., stop:] @ rows[..., stop:].mT)
            total += (product * part).sum(-1)
        return total


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: scale · (code − zero).

    weight: [..., out, d]. scale, zero: [..., out, groups]. loss, nearest_loss: [..., out], of each row and of what
    rounding to nearest does to it.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    loss: Tensor
    nearest_loss: Tensor


class RoundingSolver(ABC):
    """From a rounding problem to a weight on a grid; no row has a greater loss than when rounded to nearest."""

    damping: float
    asymmetry: float

    @abstractmethod
    def __call__(self, prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
        """prior: [..., out, d], the weight as it was."""

    def draft(self) -> RoundingSolver:
        """A solver that rounds much as this one in far less time, by which formats are compared; itself by default."""
        return self


def rounding_problem(
    prior: Tensor, moments: Moments, centre: bool, damping: float, asymmetry: float
) -> RoundingProblem:
    """V = ((1 − α) W C + α C(t, x) + λ W) M⁻¹ and M = C + λ I, with C = Cov x and λ = damping · mean(diag C).

    prior: W, [..., out, d]; what is exactly zero in it stays zero. centre: whether the intercept is free; if not, C is
    the second moment about zero. asymmetry: α, how much of the target is what the original gives on its own inputs
    rather than on the present ones. Inputs that never vary say nothing: there V = W and M = I. Where rounding has made
    C indefinite, λ grows tenfold until M has a Cholesky factor. float64 up to 1,024 columns, float32 beyond. Raises
    DataError for moments that are not finite, or so far from being moments that no damping helps.
    """
    if not bool(torch.isfinite(moments.gram).all() & torch.isfinite(moments.cross).all()):
        raise DataError("The moments of a layer's inputs or outputs hold NaN or infinity.")
    weight, gram, cross = prior.double(), moments.gram, moments.cross
    if centre:
        gram = gram - moments.mean.unsqueeze(-1) * moments.mean.unsqueeze(-2)
        cross = cross - moments.mean_target.unsqueeze(-1) * moments.mean.unsqueeze(-2)
    width = gram.shape[-1]
    identity = torch.eye(width, dtype=gram.dtype)
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    silent = (level <= 0)[..., None, None]
    ridge = damping * level
    raised = 0
    while True:
        metric = torch.where(silent, identity, gram + ridge[..., None, None] * identity)
        root, failed = torch.linalg.cholesky_ex(metric)
        if not bool(failed.any()):
            break
        if raised == _RAISES:
            raise DataError("The moments of a layer's inputs have no Cholesky factor, however much they are damped.")
        ridge, raised = torch.where(failed > 0, 10 * ridge, ridge), raised + 1
    target = weight
    if asymmetry > 0:
        wanted = asymmetry * cross + (1 - asymmetry) * weight @ gram + ridge[..., None, None] * weight
        solved = torch.cholesky_solve(wanted.mT, root).mT
        target = torch.where(silent, weight, solved)
    dtype = torch.float64 if width <= 1024 else torch.float32
    zeros = weight == 0
    return RoundingProblem(target.to(dtype), metric.to(dtype), zeros if bool(zeros.any()) else None, raised)


def nearest(prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
    """The prior rounded to nearest, every group on the grid that fits it best by the metric's diagonal."""
    prior = prior.to(problem.target.dtype)
    importance = problem.metric.diagonal(dim1=-2, dim2=-1)
    values, scales, zeros = [], [], []
    for part, counts in zip(columns_of_groups(prior, grid), columns_of_groups(importance, grid), strict=True):
        scale, zero = grid.fit(part, counts)
        values.append(scale.unsqueeze(-1) * grid.units(part, scale.unsqueeze(-1), zero.unsqueeze(-1)))
        scales.append(scale)
        zeros.append(zero)
    weight = torch.cat(values, -1)
    loss = problem.loss(weight)
    return Rounded(weight, torch.stack(scales, -1), torch.stack(zeros, -1), loss, loss)


def columns_of_groups(tensor: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """The tensor split along its last axis into the columns that share a scale."""
    return tensor.split(grid.group or tensor.shape[-1], dim=-1)


def better_rows(found: Rounded, baseline: Rounded) -> Rounded:
    """Row by row the one of less loss; `found` where both are equal. A loss that is not finite never wins."""
    worse = ~(found.loss <= baseline.loss)
    row = worse.unsqueeze(-1)
    return Rounded(
        torch.where(row, baseline.weight, found.weight),
        torch.where(row, baseline.scale, found.scale),
        torch.where(row, baseline.zero, found.zero),
        torch.where(worse, baseline.loss, found.loss),
        baseline.nearest_loss,
    )
