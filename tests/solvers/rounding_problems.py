"""Layers small enough to enumerate, and a grid apart from the step's: solver tests stand on tensors only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.solvers import Grid, RoundingProblem


@dataclass
class UniformGrid(Grid):
    """Integers from −2^(bits−1), or from 0 with a zero point, over the extremes of the group."""

    bits: int
    group: int | None = None
    shared: bool = False
    symmetric: bool = True

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        if self.shared:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.top
            return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(low)
        scale = (high - low) / self.top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.round(-low / scale)

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.clamp(torch.round(weight / scale), self.bottom - zero, self.top - zero)

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        other = torch.where(weight / scale > unit, unit + 1, unit - 1)
        return torch.clamp(other, self.bottom - zero, self.top - zero)

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def bottom(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0


def layer(seed: int, out: int, width: int, groups: int | None = None) -> tuple[Tensor, RoundingProblem]:
    """A weight and the problem of rounding it, with inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    shape = () if groups is None else (groups,)
    mixing = torch.eye(width) + 2 * torch.randn(*shape, width, width, generator=generator) / width**0.5
    x = torch.randn(*shape, 40 * width, width, generator=generator) @ mixing
    metric = (x.mT @ x / x.shape[-2]).double()
    level = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    weight = torch.randn(*shape, out, width, generator=generator).double()
    return weight, RoundingProblem(weight, metric + 0.01 * level * torch.eye(width))


def least_losses(problem: RoundingProblem, scale: Tensor, grid: UniformGrid) -> Tensor:
    """The least loss of each row over all its roundings at these scales [out], by enumeration."""
    width = problem.target.shape[-1]
    codes = torch.tensor(list(itertools.product(range(grid.bottom, grid.top + 1), repeat=width))).double()
    rows = []
    for target, step in zip(problem.target, scale):
        error = codes * step - target
        rows.append(((error @ problem.metric) * error).sum(-1).min())
    return torch.stack(rows)
