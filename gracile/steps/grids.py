"""Formats as the grids that a rounding solver works on."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.formats import Format, Int, Levels, PerGroup, PerTensor
from gracile.formats.integer import SMALLEST_SCALE
from gracile.ranges.base import Range
from gracile.solvers import Grid


class IntGrid(Grid):
    """scale · (q − zero point), q in [qmin, qmax]: one scale per row, group of columns or tensor, found by a range."""

    def __init__(self, fmt: Int, ranges: Range) -> None:
        self.fmt, self.ranges = fmt, ranges
        self.group = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None
        self.shared = isinstance(fmt.granularity, PerTensor)

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        counts = importance.unsqueeze(-2).expand_as(weight)
        one = (1, -1) if self.shared else (-1, weight.shape[-1])
        # Found in float32, which is what is stored: a solver then rounds to the very grid that the layer will have.
        scale, zero = self.ranges.rows(weight.reshape(one).float(), self.fmt, counts.reshape(one).float())
        shape = weight.shape[:-1]
        return scale.expand(shape.numel()).reshape(shape).to(weight), zero.expand(shape.numel()).reshape(shape).to(
            weight
        )

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        units = torch.div(weight, scale).round_()
        if self.fmt.symmetric:
            return units.clamp_(self.fmt.qmin, self.fmt.qmax)
        return units.clamp_(self.fmt.qmin - zero, self.fmt.qmax - zero)

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        other = unit + torch.sign(weight / scale - unit)
        return torch.clamp(other, self.fmt.qmin - zero, self.fmt.qmax - zero)


class LevelGrid(Grid):
    """scale · level of a fixed table: a scale per row, group of columns or tensor, of least weighted squared error."""

    #: Scales tried, as shares of the one that puts the largest weight on the largest level.
    SHARES = tuple(i / 64 for i in range(64, 15, -1))

    def __init__(self, fmt: Levels) -> None:
        self.table = torch.tensor(sorted(set(fmt.levels)), dtype=torch.float64)
        self.group = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None
        self.shared = isinstance(fmt.granularity, PerTensor)

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        rows = weight.reshape((1, -1) if self.shared else (-1, weight.shape[-1]))
        counts = importance.unsqueeze(-2).expand_as(weight).reshape(rows.shape)
        full = (rows.abs().amax(1) / float(self.table.abs().max())).clamp(min=SMALLEST_SCALE)
        best, least = full, torch.full_like(full, float("inf"))
        for share in self.SHARES:
            scale = full * share
            column = scale.unsqueeze(1)
            error = ((self.units(rows, column, column) * column - rows).square() * counts).sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        scale = best.float().expand(weight.shape[:-1].numel()).reshape(weight.shape[:-1]).to(weight)
        return scale, torch.zeros_like(scale)

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = self.table.to(weight)
        return table[self._places(weight / scale, table)]

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        table = self.table.to(weight)
        x = weight / scale
        return table[(self._places(x, table) + torch.sign(x - unit).long()).clamp(0, len(table) - 1)]

    def _places(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)


def grid_of(fmt: Format, ranges: Range) -> Grid | None:
    """The grid of a format's weights; None where it has no scale to round by."""
    if isinstance(fmt, Int):
        return IntGrid(fmt, ranges)
    return LevelGrid(fmt) if isinstance(fmt, Levels) else None
