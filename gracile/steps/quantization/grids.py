"""Formats as the grids that a rounding solver works on."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from gracile.formats import Format, Granularity, Int, Levels, MidRise, PerGroup, PerTensor
from gracile.formats.granularity import to_rows
from gracile.formats.integer import SMALLEST_SCALE
from gracile.ranges import MinMax
from gracile.ranges.base import Range
from gracile.solvers import Grid


class _FormatGrid(Grid):
    """Which weights share a scale, by a format's granularity."""

    def __init__(self, granularity: Granularity) -> None:
        self.group = granularity.size if isinstance(granularity, PerGroup) else None
        self.shared = isinstance(granularity, PerTensor)

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        shape = weight.shape[:-1]
        one = (1, -1) if self.shared else (-1, weight.shape[-1])
        counts = importance.unsqueeze(-2).expand_as(weight).reshape(one)
        # In float32, which is what is stored: a solver then rounds to the very grid that the layer will have.
        scale, zero = (t.float().to(weight) for t in self.fit_rows(weight.reshape(one), counts))
        return scale.expand(shape.numel()).reshape(shape), zero.expand(shape.numel()).reshape(shape)

    @abstractmethod
    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point [k] of rows [k, n] that have one each."""


class IntGrid(_FormatGrid):
    """scale · (q − zero point), q in [qmin, qmax]: one scale per row, group of columns or tensor, found by a range."""

    def __init__(self, fmt: Int, ranges: Range) -> None:
        super().__init__(fmt.granularity)
        self.fmt, self.ranges = fmt, ranges

    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return self.ranges.rows(rows.float(), self.fmt, importance.float())

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        units = torch.div(weight, scale).round_()
        if self.fmt.symmetric:
            return units.clamp_(self.fmt.qmin, self.fmt.qmax)
        return units.clamp_(self.fmt.qmin - zero, self.fmt.qmax - zero)

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        other = unit + torch.sign(weight / scale - unit)
        return torch.clamp(other, self.fmt.qmin - zero, self.fmt.qmax - zero)


class LevelGrid(_FormatGrid):
    """scale · level of a fixed table: a scale per row, group of columns or tensor, of least weighted squared error."""

    #: Scales tried, as shares of the one that puts the largest weight on the largest level.
    SHARES = tuple(i / 64 for i in range(64, 7, -1))

    def __init__(self, fmt: Levels) -> None:
        super().__init__(fmt.granularity)
        self.table = torch.tensor(sorted(set(fmt.levels)), dtype=torch.float64)

    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        full = (rows.abs().amax(1) / float(self.table.abs().max())).clamp(min=SMALLEST_SCALE)
        best, least = full, torch.full_like(full, float("inf"))
        for share in self.SHARES:
            scale = full * share
            column = scale.unsqueeze(1)
            error = ((self.units(rows, column, column) * column - rows).square() * importance).sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best, torch.zeros_like(best)

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = self.table.to(weight)
        return table[self._places(weight / scale, table)]

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        table = self.table.to(weight)
        x = weight / scale
        return table[(self._places(x, table) + torch.sign(x - unit).long()).clamp(0, len(table) - 1)]

    def _places(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)


def nearest_codes(weight: Tensor, fmt: Format, ranges: Range) -> dict[str, Tensor]:
    """The weight by its nearest codes, on the grid that the range finds; of a mid-rise one, on that of least error.

    Raises ConfigError for values that the format does not reach.
    """
    if isinstance(fmt, Int):
        return fmt.encode(weight, ranges.weight(weight, fmt))
    if isinstance(fmt, MidRise) and not isinstance(ranges, MinMax):
        return fmt.encode(weight, _least_error_scale(fmt, weight))
    return fmt.encode(weight)


def _least_error_scale(fmt: Levels, weight: Tensor) -> Tensor:
    """Scales of the weight, float32 of `fmt.scale_shape(weight.shape)`: of least squared error of those tried."""
    rows = to_rows(fmt.granularity, weight.detach().float())
    scale, _ = LevelGrid(fmt).fit_rows(rows, torch.ones_like(rows))
    return scale.reshape(fmt.scale_shape(weight.shape))


def grid_of(fmt: Format, ranges: Range) -> Grid | None:
    """The grid of a format's weights; None where it has no scale to round by."""
    if isinstance(fmt, Int):
        return IntGrid(fmt, ranges)
    return LevelGrid(fmt) if isinstance(fmt, Levels) else None
