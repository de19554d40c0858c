"""Where the units of an atom sit along a dimension, which positions stay after a cut, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from gracile.graph.axes import Atom, Expr, Factor, atoms, resolve


def unit_positions(expr: Expr, atom: Atom) -> Tensor:
    """Positions along the dimension that each unit of the atom occupies, as [units, k] int64, ascending in k.

    k is 0 when the atom does not occur in the expression.
    """
    owner = _owners(resolve(expr), atom)
    order = torch.argsort(owner, stable=True)
    return order[int((owner < 0).sum()) :].reshape(atom.size, -1)


def kept_mask(expr: Expr, keep: Mapping[Atom, Tensor]) -> Tensor:
    """Which positions of the dimension stay, as a bool vector, when each atom keeps the units that its mask says."""
    mask = torch.ones(1, dtype=torch.bool)
    for factor in resolve(expr):
        mask = (mask[:, None] & _factor_mask(factor, keep)[None, :]).flatten()
    return mask


def kept_count(expr: Expr, counts: Mapping[Atom, int]) -> int:
    """Size of the dimension when each atom named keeps that many units."""
    return prod(
        counts.get(factor, factor.size)
        if isinstance(factor, Atom)
        else sum(kept_count(segment, counts) for segment in factor.segments)
        for factor in resolve(expr)
    )


def occurs_once_per_product(expr: Expr, atom: Atom) -> bool:
    """Whether no product inside the expression has the atom in two of its factors, which no cut could serve."""
    holders = 0
    for factor in resolve(expr):
        if isinstance(factor, Atom):
            holders += factor is atom
        else:
            if not all(occurs_once_per_product(segment, atom) for segment in factor.segments):
                return False
            holders += any(other is atom for other in atoms((factor,)))
    return holders <= 1


def _owners(expr: Expr, atom: Atom) -> Tensor:
    """Unit of the atom at each position, -1 where there is none."""
    owner = torch.full((1,), -1)
    for factor in expr:
        if isinstance(factor, Atom):
            own = torch.arange(factor.size) if factor is atom else torch.full((factor.size,), -1)
        else:
            own = torch.cat([_owners(resolve(segment), atom) for segment in factor.segments])
        owner = torch.maximum(owner[:, None], own[None, :]).flatten()
    return owner


def _factor_mask(factor: Factor, keep: Mapping[Atom, Tensor]) -> Tensor:
    if isinstance(factor, Atom):
        mask = keep.get(factor)
        return torch.ones(factor.size, dtype=torch.bool) if mask is None else mask
    return torch.cat([kept_mask(segment, keep) for segment in factor.segments])
