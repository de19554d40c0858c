"""Tables of levels times a scale."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gracile.formats import FP8, MXFP4, NVFP4, Levels
from gracile.formats.integer import SMALLEST_SCALE
from gracile.steps.quantization.grids.base import FormatGrid


class LevelGrid(FormatGrid):
    """scale · level of a fixed table: a scale per row, group of columns or tensor, of least weighted squared error."""

    #: Scales tried, as shares of the one that puts the largest weight on the largest level.
    SHARES: ClassVar[tuple[float, ...]] = tuple(i / 64 for i in range(64, 7, -1))

    def __init__(self, fmt: Levels | FP8 | MXFP4 | NVFP4) -> None:
        super().__init__(fmt.granularity)
        self.fmt: Any = fmt
        self.table = torch.tensor(sorted(set(fmt.levels)), dtype=torch.float64)

    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        full = (rows.abs().amax(1) / float(self.table.abs().max())).clamp(min=SMALLEST_SCALE)
        best, least = full, torch.full_like(full, float("inf"))
        for share in self.SHARES:
            scale = self.stored(full * share)
            column = scale.unsqueeze(1)
            error = ((self.units(rows, column, column) * column - rows).square() * importance).sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best, torch.zeros_like(best)

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = self.table.to(weight)
        return table[place_of(weight / scale, table)]

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        return next_level(weight / scale, unit, self.table.to(weight))

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self.fmt.encode(weight, scale)
        return tensors


def place_of(x: Tensor, table: Tensor) -> Tensor:
    """Where in an ascending table the level nearest to each value stands, halfway to the lower."""
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)


def next_level(x: Tensor, unit: Tensor, table: Tensor) -> Tensor:
    """The level next nearest to x on the other side than `unit`, which is the nearest; that where there is none."""
    return table[(place_of(x, table) + torch.sign(x - unit).long()).clamp(0, len(table) - 1)]
