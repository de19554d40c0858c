"""Where in the cells of its codes a weight starts to train: near to the original, unless a solver knew better."""

from __future__ import annotations

import torch
from torch import Tensor

#: How far from a grid point, in steps, a weight may start to train: not quite the half that would round it elsewhere.
CELL = 0.49
#: Rows whose factors are found at a time: the table of a large embedding has many.
ROWS = 4096


def start_in_cells(weight: Tensor, prior: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values that round to the weight, in its cells the nearest to f · prior, or at their grid points.

    The factor f of a row is the one for which most codes are those that rounding to nearest gives. Where even then
    another code is the nearest, the code was solved for, or trained, and the value starts at its grid point: at the
    edge of the cell, where it would be nearest to the prior, a few steps of an optimizer undo what was found.

    weight, prior: [rows, columns] floating point, the one on its grid, the other not. step: between neighbouring grid
    points, low, high: the ends of the grid, all broadcast to [rows, columns]. Beyond an end the prior may lie however
    far: there is no other code. Returns [rows, columns].
    """
    edges = torch.stack(
        [
            torch.where(weight < low + step / 4, -torch.inf, weight - step / 2),
            torch.where(weight > high - step / 4, torch.inf, weight + step / 2),
        ]
    )
    parts = zip(edges.split(ROWS, dim=1), weight.split(ROWS), prior.split(ROWS))
    wanted = torch.cat([_factors(*part) for part in parts]) * prior
    nearest = (wanted >= edges[0]) & (wanted <= edges[1])
    reach = CELL * step
    inside = torch.maximum(torch.minimum(wanted, weight + reach), weight - reach)
    return torch.where(nearest, inside, weight)


def _factors(edges: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """f > 0 [rows, 1] for which most of f · prior lie between their edges [2, rows, columns]; 1 in rows of zeros.

    Each value allows an interval of factors. Sorted, their ends tell how many overlap where: f is the middle of where
    most do; or, where this is without bound, the one of least squares.
    """
    bounds = edges / torch.where(prior == 0, torch.nan, prior)
    opens, closes = bounds.amin(0).clamp_min(0), bounds.amax(0)
    possible = closes > opens  # not where the signs differ, or the prior is zero
    opens = torch.where(possible, opens, torch.inf)
    closes = torch.where(possible, closes, torch.inf)
    places, order = torch.cat([opens, closes], dim=1).sort(dim=1)
    change = torch.cat([possible.int(), -possible.int()], dim=1).gather(1, order)
    best = change.cumsum(1)[:, :-1].argmax(1, keepdim=True)
    start, end = places.gather(1, best), places.gather(1, best + 1)
    fitted = (weight * prior).sum(1, keepdim=True) / prior.square().sum(1, keepdim=True)
    factor = torch.where(torch.isfinite(end), (start + end) / 2, torch.maximum(start, fitted))
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))
