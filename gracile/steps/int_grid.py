"""A format of integers as the grid that a rounding solver works on."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.formats import Int, PerGroup, PerTensor
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
        return torch.clamp(torch.round(weight / scale), self.fmt.qmin - zero, self.fmt.qmax - zero)

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        other = unit + torch.sign(weight / scale - unit)
        return torch.clamp(other, self.fmt.qmin - zero, self.fmt.qmax - zero)
