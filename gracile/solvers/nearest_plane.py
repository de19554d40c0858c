"""Columns rounded one after another, their errors taken up by those that follow; several roundings side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.solvers.rounding import Grid, RoundingProblem


@dataclass
class Columns:
    """Units, scales and zero points of a weight with the columns first: [..., d, out] and [..., groups, out].

    group: how many columns share a scale.
    """

    units: Tensor
    scale: Tensor
    zero: Tensor
    group: int

    @property
    def weight(self) -> Tensor:
        scale = self.scale.repeat_interleave(self.group, dim=-2)[..., : self.units.shape[-2], :]
        return self.units * scale

    def in_order(self, order: Tensor) -> Columns:
        """Columns and their groups in another order, [..., d], that keeps groups together."""
        units = self.units.gather(-2, order.unsqueeze(-1).expand_as(self.units))
        places = (order[..., :: self.group] // self.group).unsqueeze(-1).expand_as(self.scale)
        return Columns(units, self.scale.gather(-2, places), self.zero.gather(-2, places), self.group)


def nearest_plane(
    problem: RoundingProblem, grid: Grid, block: int, beam: int, given: Columns | None = None
) -> tuple[Columns, Tensor]:
    """c_j = v_j − Σ_{k<j} (L_kj / L_jj) (q_k − v_k) rounded column by column; M = L Lᵀ, the columns in reverse order.

    The loss is Σ_j L_jj² (q_j − c_j)². Of each row the `beam` roundings of least loss so far go on, each with the
    nearest and the second-nearest unit of its next column (the M-algorithm of Anderson and Mohan 1984, K-best in
    lattice decoding); with a beam of one this is Babai's nearest plane. block: columns whose errors are passed on
    together, whole groups; it changes nothing but the time. given: whose scales and zero points are taken; None: those
    that fit the weights, compensated for the errors of the groups before. Gives the loss of each row too, [..., out].
    """
    search, width = _Search(problem, grid, beam, given), problem.target.shape[-1]
    if grid.group is None:
        search.set_scale(problem.target, 0, width)
    for start in range(0, width, block):
        search.go_through(start, min(start + block, width))
    return search.best()


class _Search:
    """The roundings that go on, along the first axis: units and errors [beam, ..., d, out], losses [beam, ..., out]."""

    def __init__(self, problem: RoundingProblem, grid: Grid, beam: int, given: Columns | None) -> None:
        self.grid, self.beam, self.given, self.zeros = grid, beam, given, problem.zeros
        self.target = target = problem.target.mT.contiguous()  # [..., d, out]
        self.group = grid.group or target.shape[-2]
        self.importance = problem.metric.diagonal(dim1=-2, dim2=-1)
        self.factor = torch.linalg.cholesky(problem.metric.flip(-1, -2))
        self.pivots = self.factor.diagonal(dim1=-2, dim2=-1).flip(-1)
        self.weights = self.pivots.square()
        self.units, self.errors = (target.new_zeros(beam, *target.shape) for _ in range(2))
        self.loss = target.new_full((beam, *target.shape[:-2], target.shape[-1]), float("inf"))
        self.loss[0] = 0
        self.scales: list[Tensor] = []
        self.zero_points: list[Tensor] = []

    def set_scale(self, weight: Tensor, start: int, stop: int) -> None:
        """Fit the scales of a group to these weights, [(beam,) ..., out, n]."""
        if self.given is None:
            scale, zero = self.grid.fit(weight, self.importance[..., start:stop])
        else:
            place = start // self.group
            scale, zero = self.given.scale[..., place, :], self.given.zero[..., place, :]
        self.scales.append(scale.expand_as(self.loss).clone())
        self.zero_points.append(zero.expand_as(self.loss).clone())

    def go_through(self, start: int, stop: int) -> None:
        """Round the columns of one block."""
        passed = self._passed(start, stop)
        present = self.target[..., start:stop, :] - passed[..., :start, :].mT @ self.errors[..., :start, :]
        inside = passed[..., start:, :]
        chosen: list[tuple[Tensor, Tensor | None]] = []
        known = len(self.scales)
        for j in range(start, stop):
            i = j - start
            if self.grid.group is not None and j % self.group == 0:
                end = min(j + self.group, stop)
                self.set_scale(present[..., i : i + end - j, :].mT, j, end)
            unit, parent = self._choose(present[..., i, :], j)
            chosen.append((unit, parent))
            if parent is not None:
                present[..., i + 1 :, :] = _of(present[..., i + 1 :, :], parent)
            # The minimum moves by the whole error of column j, of which the compensation so far is a part.
            error = unit * self.scales[-1] - self.target[..., j, :]
            present[..., i + 1 :, :].addcmul_(inside[..., i, i + 1 :].unsqueeze(-1), error.unsqueeze(-2), value=-1)
        self._trace_back(chosen, start, known)
        if self.beam == 1:  # nothing has been told apart, and what is left in `present` are the minima
            rounded = self.errors[..., start:stop, :] + self.target[..., start:stop, :]
            self.loss += ((rounded - present).square_() * self.weights[..., start:stop].unsqueeze(-1)).sum(-2)

    def _passed(self, start: int, stop: int) -> Tensor:
        """[..., stop, columns of the block]: what an error in column k shifts the minimum of column j by."""
        width = self.factor.shape[-1]
        part = self.factor[..., width - stop :, width - stop : width - start].flip(-1, -2)
        return part / self.pivots[..., None, start:stop]

    def _choose(self, centre: Tensor, column: int) -> tuple[Tensor, Tensor | None]:
        """Units [beam, ..., out] of the roundings that go on, and which of those so far each continues."""
        scale, zero = self.scales[-1], self.zero_points[-1]
        unit = self.grid.units(centre, scale, zero)
        if self.zeros is not None:
            unit = unit.masked_fill(self.zeros[..., column], 0.0)
        if self.beam == 1:
            return unit, None
        second = self.grid.second(centre, scale, zero, unit)
        if self.zeros is not None:
            second = second.masked_fill(self.zeros[..., column], 0.0)
        weight = self.weights[..., column].unsqueeze(-1)
        losses = [self.loss + weight * (u * scale - centre).square() for u in (unit, second)]
        losses[1][second == unit] = float("inf")  # the grid has no other unit on that side
        self.loss, places = torch.cat(losses).topk(self.beam, dim=0, largest=False)
        parent = places % self.beam
        if self.grid.group is not None:
            self.scales[-1], self.zero_points[-1] = scale.gather(0, parent), zero.gather(0, parent)
        return torch.cat([unit, second]).gather(0, places), parent

    def _trace_back(self, chosen: list[tuple[Tensor, Tensor | None]], start: int, known: int) -> None:
        """Put what the roundings that are left chose in this block, and before it, in their places."""
        place: Tensor | None = None  # which of the roundings of that time each of those left goes back to
        units: list[Tensor] = []
        for j in reversed(range(start, start + len(chosen))):
            unit, parent = chosen[j - start]
            group = j // self.group
            if place is not None and (j + 1) % self.group == 0 and group >= known:
                for values in (self.scales, self.zero_points):
                    values[group] = values[group].gather(0, place)
            units.append(unit if place is None else unit.gather(0, place))
            if parent is not None:
                place = parent if place is None else parent.gather(0, place)
        if place is not None and start:
            self.units[..., :start, :] = _of(self.units[..., :start, :], place)
            self.errors[..., :start, :] = _of(self.errors[..., :start, :], place)
            for values in (self.scales, self.zero_points):
                values[:known] = [value.gather(0, place) for value in values[:known]]
        stop = start + len(chosen)
        block = torch.stack(units[::-1], -2)
        groups = torch.arange(start, stop) // self.group
        scale = torch.stack(self.scales[int(groups[0]) :], -2)
        if self.group < self.target.shape[-2]:
            scale = scale.index_select(-2, (groups - groups[0]).to(scale.device))
        self.units[..., start:stop, :] = block
        self.errors[..., start:stop, :] = block * scale - self.target[..., start:stop, :]

    def best(self) -> tuple[Columns, Tensor]:
        """The rounding of least loss of each row, and that loss."""
        place = self.loss.argmin(0, keepdim=True)
        units = _of(self.units, place).squeeze(0)
        scale, zero = (
            torch.stack([t.gather(0, place).squeeze(0) for t in s], -2) for s in (self.scales, self.zero_points)
        )
        return Columns(units, scale, zero, self.group), self.loss.gather(0, place).squeeze(0)


def _of(values: Tensor, place: Tensor) -> Tensor:
    """[beam, ..., n, out] of the roundings at these places [beam', ..., out]."""
    return values.gather(0, place.unsqueeze(-2).expand(*place.shape[:-1], values.shape[-2], place.shape[-1]))
