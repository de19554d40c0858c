"""All roundings of short rows, such as the nine weights of a channel of a depthwise 3×3 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.solvers.nearest_plane import Columns
from gracile.solvers.rounding import Grid, RoundingProblem

#: Values of rows × roundings × columns that are laid out at a time.
_CHUNK = 1 << 23


def enumerate_roundings(state: Columns, problem: RoundingProblem, grid: Grid) -> None:
    """argmin over u of (s u − V) M (s u − V)ᵀ, each u_j the unit below or above V_j / s; in place, row by row.

    s: the state's scales. All 2^d roundings of a row of d columns are tried; a row for which none is better than what
    it holds stays, since a code two steps away can be.
    """
    target = problem.target.mT
    width = target.shape[-2]
    places = torch.arange(width, device=target.device) // state.group
    scale, zero = state.scale.index_select(-2, places), state.zero.index_select(-2, places)
    unit = grid.units(target, scale, zero)
    second = grid.second(target, scale, zero, unit)
    if problem.zeros is not None:
        unit, second = (values.masked_fill(problem.zeros.mT, 0.0) for values in (unit, second))
    errors = torch.stack([unit * scale - target, second * scale - target])  # [2, ..., d, out]
    bits = torch.arange(2**width, device=target.device).unsqueeze(1) >> torch.arange(width, device=target.device) & 1
    best = _least(errors, problem.metric, bits)
    chosen = bits[best].mT.to(torch.bool)  # [..., d, out]
    found = torch.where(chosen, second, unit)
    better = problem.loss((found * scale).mT) < problem.loss((state.units * scale).mT)
    state.units = torch.where(better.unsqueeze(-2), found, state.units)


def _least(errors: Tensor, metric: Tensor, bits: Tensor) -> Tensor:
    """[..., out]: the row of `bits` [n, d] whose choice between the two errors [2, ..., d, out] has the least loss."""
    first, second = errors.mT.unsqueeze(-2)  # [..., out, 1, d]
    rows = first.shape[-3]
    length = max(1, _CHUNK // (bits.numel() * max(1, first[..., 0, 0, 0].numel())))
    found = []
    for start in range(0, rows, length):
        part = slice(start, start + length)
        error = torch.where(bits.to(torch.bool), second[..., part, :, :], first[..., part, :, :])
        found.append(((error @ metric.unsqueeze(-3)) * error).sum(-1).argmin(-1))
    return torch.cat(found, dim=-1)
