"""GPTQ: columns rounded one after another, the errors made so far taken up by those that follow; then polished."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.enumeration import enumerate_roundings
from gracile.solvers.nearest_plane import Columns, nearest_plane
from gracile.solvers.rounding import Grid, Rounded, RoundingProblem, RoundingSolver, better_rows, nearest

#: Columns up to which polishing also tries all roundings of a row, up or down each.
SHORT = 10


@dataclass(frozen=True)
class GPTQ(RoundingSolver):
    """q_j = round(v_j − Σ_{k<j} (L_kj / L_jj) (q_k − v_k)), column by column; M = L Lᵀ, the columns in reverse order.

    This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) without its inverse: the compensated weight of a column is the
    conditional minimum given the columns that are rounded, which the Cholesky factor of the Hessian itself holds
    (Babai's nearest plane; Chen et al. 2025, arXiv:2507.18553). Departures: the target is the asymmetric one
    (`rounding_problem`; α = 1/4 in GPTAQ, arXiv:2504.02692); scales are fitted to the compensated weights, weighted by
    the diagonal of M; and codes and scales are polished by coordinate descent on the same loss afterwards, each by its
    exact minimum. A row that rounding to nearest serves better is rounded to nearest.

    order: "activation" sorts columns by falling M_jj, inside a group and the groups by their largest, so that no index
        is needed when the model runs (group-aware order); "given" takes them as they stand.
    beam: roundings of a row that go on side by side (`nearest_plane`); 1 is GPTQ's own sweep. None: as many as keep
        the sweep below 2³¹ multiplications, from 1 to 8.
    polish: sweeps of the descent; 0 leaves the weight as GPTQ gives it. Of rows of up to ten columns (depthwise 3×3
        convolutions) all roundings up or down are tried besides.
    rounds: how often columns are rounded and polished, from the second time on with the scales that the last polish
        found; the best of each row is kept.
    damping: λ as a share of the mean of the diagonal. asymmetry: α, from 0 (what the layer gives on its present inputs)
        to 1 (what the original gave on its own).
    block: columns whose errors are passed on together; it changes nothing but the time.
    """

    order: str = "activation"
    beam: int | None = None
    polish: int = 3
    rounds: int = 4
    damping: float = 0.01
    asymmetry: float = 0.5
    block: int = 128

    def __post_init__(self) -> None:
        if self.order not in ("activation", "given"):
            raise ConfigError(f"GPTQ(order={self.order!r}): 'activation' or 'given'.")
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"GPTQ(damping={self.damping!r}): expected a positive number.")
        if not 0 <= self.asymmetry <= 1:
            raise ConfigError(f"GPTQ(asymmetry={self.asymmetry!r}): expected a number from 0 to 1.")
        if self.polish < 0 or min(self.rounds, self.block, 1 if self.beam is None else self.beam) < 1:
            raise ConfigError("GPTQ: polish is at least 0, rounds, block and beam at least 1.")

    def beam_for(self, weight: Tensor) -> int:
        """How many roundings of each row of a weight [..., out, d] go on."""
        products = weight.numel() * weight.shape[-1]
        return self.beam or max(1, min(8, (1 << 31) // max(products, 1)))

    def draft(self) -> GPTQ:
        """One rounding of each row, once: about a tenth of the time."""
        return replace(self, beam=1, rounds=1)

    def __call__(self, prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
        baseline = nearest(prior, problem, grid)
        group = grid.group or prior.shape[-1]
        block = self.block if grid.group is None else -(-self.block // group) * group
        order = column_order(problem.metric, group) if self.order == "activation" else None
        sorted_problem, back = _permuted(problem, order), None if order is None else order.argsort(dim=-1)
        best, given = baseline, None
        for _ in range(1 if grid.shared else self.rounds):  # a scale for all rows is not polished
            state, loss = nearest_plane(sorted_problem, grid, block, self.beam_for(prior), given)
            if back is not None:
                state = state.in_order(back)
            for _ in range(self.polish):
                _descend(state, problem, grid, block)
                if prior.shape[-1] <= SHORT:
                    enumerate_roundings(state, problem, grid)
            weight = state.weight.mT
            loss = problem.loss(weight) if self.polish else loss
            found = Rounded(weight, state.scale.mT, state.zero.mT, loss, baseline.loss)
            best = better_rows(found, best)
            given = state if order is None else state.in_order(order)
        return best


def column_order(metric: Tensor, group: int) -> Tensor:
    """[..., d]: columns by falling diagonal inside their group, groups by their largest; a shorter last one stays."""
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    width = diagonal.shape[-1]
    padded = torch.nn.functional.pad(diagonal, (0, -width % group), value=float("-inf")).unflatten(-1, (-1, group))
    peaks = padded.amax(-1)
    if width % group:
        peaks[..., -1] = float("-inf")
    places = peaks.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    place = places.repeat_interleave(group, dim=-1)[..., :width]
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, place.gather(-1, order).argsort(dim=-1, stable=True))


def _permuted(problem: RoundingProblem, order: Tensor | None) -> RoundingProblem:
    if order is None:
        return problem
    if order.ndim == 1:  # whole rows and columns of a large metric are copied far faster than they are gathered
        zeros = None if problem.zeros is None else problem.zeros[:, order]
        metric = problem.metric.index_select(0, order).index_select(1, order)
        return RoundingProblem(problem.target[:, order], metric, zeros)
    columns = order.unsqueeze(-2).expand_as(problem.target)
    target = problem.target.gather(-1, columns)
    zeros = None if problem.zeros is None else problem.zeros.gather(-1, columns)
    metric = problem.metric.gather(-2, order.unsqueeze(-1).expand_as(problem.metric))
    return RoundingProblem(target, metric.gather(-1, order.unsqueeze(-2).expand_as(metric)), zeros)


def _descend(state: Columns, problem: RoundingProblem, grid: Grid, block: int) -> None:
    """One sweep of coordinate descent over all scales and codes, in place; no step raises the loss of a row."""
    metric, target = problem.metric, problem.target.mT
    width, group = target.shape[-2], state.group
    error = state.weight - target
    if grid.group is None and not grid.shared:
        _rescale(state, 0, metric @ error, metric, grid)
        error = state.weight - target
    for start in range(0, width, block):
        stop = min(start + block, width)
        slope = metric[..., start:stop, :] @ error  # half the gradient
        for j in range(start, stop):
            i = j - start
            place = j // group
            if grid.group is not None and j % group == 0:
                end = min(j + group, width)
                inner = metric[..., j:end, j:end]
                change = _rescale(state, place, slope[..., i : end - start, :], inner, grid)
                shift = state.units[..., j:end, :] * change.unsqueeze(-2)
                error[..., j:end, :] += shift
                slope += metric[..., start:stop, j:end] @ shift
            scale, zero, before = state.scale[..., place, :], state.zero[..., place, :], state.units[..., j, :]
            best = before * scale - slope[..., i, :] / metric[..., j, j].unsqueeze(-1)
            unit = grid.units(best, scale, zero)
            if problem.zeros is not None:
                unit = unit.masked_fill(problem.zeros[..., j], 0.0)
            change = (unit - before) * scale
            state.units[..., j, :] = unit
            error[..., j, :] += change
            slope.addcmul_(metric[..., start:stop, j].unsqueeze(-1), change.unsqueeze(-2))


def _rescale(state: Columns, place: int, slope: Tensor, inner: Tensor, grid: Grid) -> Tensor:
    """Set the scales of one group to their best for the codes they have; how much each changed, [..., out].

    The loss is a parabola in each scale: of those that can be stored, the nearest to the best is best.

    slope: half the gradient in the group's columns, [..., n, out]. inner: the metric among them.
    """
    start = place * state.group
    units = state.units[..., start : start + inner.shape[-1], :]
    curvature = (units * (inner @ units)).sum(-2)
    scale = state.scale[..., place, :]
    best = scale - (units * slope).sum(-2) / curvature
    best = torch.where((best * scale > 0) & torch.isfinite(best) & (curvature > 0), grid.stored(best), scale)
    change = best - scale
    state.scale[..., place, :] = best
    return change
