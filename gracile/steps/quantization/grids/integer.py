"""Integers times a scale: of any granularity as ranges find it, or the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.formats import FixedPoint, Int, PerTensor
from gracile.ranges.base import Range
from gracile.steps.quantization.grids.base import FormatGrid


class IntGrid(FormatGrid):
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

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return self.fmt.encode(weight, scale, None if self.fmt.symmetric else zero.to(torch.int16))


class FixedPointGrid(FormatGrid):
    """q / factor, q any integer."""

    def __init__(self, fmt: FixedPoint) -> None:
        super().__init__(PerTensor())
        self.fmt = fmt

    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(rows[:, 0], 1 / self.fmt.factor), torch.zeros_like(rows[:, 0])

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.div(weight, scale).round_()

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        return unit + torch.sign(weight / scale - unit)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return self.fmt.encode(weight)

    def stored_scale(self, encoded: dict[str, Tensor]) -> Tensor:
        return torch.full((), 1 / self.fmt.factor, device=encoded["codes"].device)
