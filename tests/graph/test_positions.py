"""Positions, masks and counts against hand-counted and brute-force expectations."""

from __future__ import annotations

import torch

from gracile.graph.axes import Expr, concatenate, fresh
from gracile.graph.positions import kept_count, kept_mask, occurs_once_per_product, unit_positions


def atom_of(expr: Expr):  # type: ignore[no-untyped-def]
    return expr[0]


def test_positions_of_an_outer_and_of_an_inner_factor() -> None:
    h, d = fresh(2), fresh(3)
    assert unit_positions((*h, *d), atom_of(h)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert unit_positions((*h, *d), atom_of(d)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_positions_in_a_padded_sum() -> None:
    x = fresh(3)
    assert unit_positions(concatenate((fresh(2, "pad"), x, fresh(1))), atom_of(x)).tolist() == [[2], [3], [4]]


def test_positions_of_an_atom_that_occurs_in_two_segments() -> None:
    h, d = fresh(2), fresh(2)
    expr = concatenate(((*h, *d), h, d))  # d at 0..3 and 6..7
    assert unit_positions(expr, atom_of(h)).tolist() == [[0, 1, 4], [2, 3, 5]]
    assert unit_positions(expr, atom_of(d)).tolist() == [[0, 2, 6], [1, 3, 7]]


def test_mask_and_count_agree_with_positions_on_a_nested_expression() -> None:
    a, b, c = fresh(3), fresh(4), fresh(5)
    expr = (*fresh(2), *concatenate(((*a, *b), c, a)))
    keep = {
        atom_of(a): torch.tensor([True, False, True]),
        atom_of(b): torch.tensor([False, True, True, False]),
        atom_of(c): torch.tensor([True, True, False, True, True]),
    }
    expected = torch.ones(2 * (12 + 5 + 3), dtype=torch.bool)
    for atom, mask in keep.items():
        expected[unit_positions(expr, atom)[~mask].flatten()] = False
    assert kept_mask(expr, keep).tolist() == expected.tolist()
    assert kept_count(expr, {atom: int(mask.sum()) for atom, mask in keep.items()}) == int(expected.sum()) == 20


def test_an_atom_times_itself_is_found() -> None:
    x, y = fresh(3), fresh(2)
    assert not occurs_once_per_product((*x, *y, *x), atom_of(x))
    assert not occurs_once_per_product((*y, *concatenate((x, (*x, *x)))), atom_of(x))
    assert occurs_once_per_product(concatenate((x, x)), atom_of(x))
