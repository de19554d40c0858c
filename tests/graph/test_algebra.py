"""The algebra against expectations worked out by hand."""

from __future__ import annotations

import pytest

from gracile.graph.algebra import slice_expr, split_expr, unify
from gracile.graph.axes import (
    Atom,
    Expr,
    Sum,
    atoms,
    concatenate,
    freeze,
    fresh,
    frozen_reason,
    is_fixed,
    mark_inexact,
    resolve,
    show,
    size,
)


def parts(expr: Expr, outer: int) -> tuple[Expr, Expr]:
    halves = split_expr(expr, outer)
    assert halves is not None
    return halves


def test_an_atom_splits_into_outer_and_inner_everywhere() -> None:
    x = fresh(12)
    elsewhere = (*x, *fresh(5))
    outer, inner = parts(x, 4)
    assert [size(outer), size(inner)] == [4, 3]
    assert resolve(elsewhere)[:2] == (*outer, *inner)
    assert show(elsewhere) == "4·3·5"


def test_an_atom_is_not_split_where_it_does_not_divide() -> None:
    assert split_expr(fresh(12), 5) is None


def test_two_atoms_become_one() -> None:
    x, y = fresh(6), fresh(6)
    unify(x, y)
    assert resolve(x) == resolve(y)


def test_a_frozen_atom_freezes_what_it_meets_with_its_reason() -> None:
    x, y = fresh(6), fresh(6, "because")
    unify(x, y)
    assert frozen_reason(x) == "because"


def test_products_are_refined_to_a_common_prefix() -> None:
    x = (*fresh(4), *fresh(6))
    y = (*fresh(2), *fresh(12))
    unify(x, y)
    assert resolve(x) == resolve(y)
    assert [atom.size for atom in atoms(x)] == [2, 2, 6]


def test_products_without_a_common_prefix_are_frozen() -> None:
    x, y = (*fresh(4), *fresh(9)), (*fresh(6), *fresh(6))
    unify(x, y)
    assert is_fixed(x)
    assert is_fixed(y)


def test_sums_are_cut_at_the_nearer_boundary() -> None:
    x, y = concatenate((fresh(3), fresh(5))), concatenate((fresh(4), fresh(4)))
    unify(x, y)
    assert [atom.size for atom in atoms(x)] == [3, 4]  # the segment of one between them has no atom
    assert show(x) == show(y) == "(3 + 1 + 4)"


def test_a_sum_of_equal_segments_against_a_stack_ties_the_segments() -> None:
    q, k, v, inner = fresh(5), fresh(5), fresh(5), fresh(5)
    unify(concatenate((q, k, v)), (*fresh(3), *inner))
    assert resolve(q) == resolve(k) == resolve(v) == resolve(inner)
    assert not is_fixed(inner)


def test_packed_heads_split_into_a_sum_of_heads_and_one_shared_head_size() -> None:
    q, k, v = fresh(12), fresh(6), fresh(6)
    heads, head_size = parts(concatenate((q, k, v)), 8)
    assert isinstance(heads[0], Sum)
    assert [size(segment) for segment in heads[0].segments] == [4, 2, 2]
    assert size(head_size) == 3
    assert resolve(q)[1:] == resolve(k)[1:] == resolve(v)[1:] == resolve(head_size)
    assert resolve(q)[0] is not resolve(k)[0]
    assert resolve(k)[0] is not resolve(v)[0]


def test_a_slice_refines_an_atom_into_parts_laid_end_to_end() -> None:
    x = fresh(10)
    middle = slice_expr(x, 2, 5)
    assert size(middle) == 5
    assert show(x) == "(2 + 5 + 3)"
    assert slice_expr(x, 2, 5) == middle


def test_a_slice_of_whole_inner_parts_slices_the_outer_factor() -> None:
    outer, inner = fresh(4), fresh(3)
    assert resolve(slice_expr((*outer, *inner), 3, 6))[-1:] == inner
    assert show(outer) == "(1 + 2 + 1)"


def test_a_slice_across_inner_parts_freezes() -> None:
    x = (*fresh(4), *fresh(3))
    assert is_fixed(slice_expr(x, 2, 5))
    assert is_fixed(x)


def test_halves_multiplied_are_one_atom_twice() -> None:
    x = fresh(8)
    unify(slice_expr(x, 0, 4), slice_expr(x, 4, 4))
    first, second = atoms(x)
    assert first is second


def test_padding_cannot_be_cut_and_the_rest_can() -> None:
    x = fresh(8)
    stream = fresh(16)
    unify(concatenate((fresh(4, "padding"), x, fresh(4, "padding"))), stream)
    assert [(atom.size, atom.frozen) for atom in atoms(stream)] == [(4, "padding"), (8, None), (4, "padding")]


def test_a_dimension_that_would_contain_itself_is_frozen() -> None:
    x = fresh(4)
    y = concatenate((x, fresh(2)))
    unify(y, fresh(6))
    z = fresh(6)
    unify(z, y)
    unify((*x, *fresh(1)), x)
    assert not is_fixed(x)
    inner = fresh(2)
    unify(inner, (Sum((inner, (Atom(0),))),))
    assert size(inner) == 2


def test_what_is_known_of_an_atom_passes_to_its_parts() -> None:
    x = fresh(6)
    mark_inexact(x, "normed")
    outer, inner = parts(x, 2)
    assert {atom.inexact for atom in atoms((*outer, *inner))} == {"normed"}
    freeze(x, "late")
    assert frozen_reason(inner) == "late"


@pytest.mark.parametrize("n", [1, 2, 7])
def test_sizes_that_disagree_freeze_and_do_not_raise(n: int) -> None:
    x, y = fresh(6), fresh(n)
    unify(x, y)
    assert is_fixed(x)
    assert is_fixed(y)
