"""Traced integers behave as ints and remember their formula."""

from __future__ import annotations

import copy
import json

import torch

from gracile.graph.integers import Attribute, Formula, Traced, source_of

HEADS, SIZE = Attribute("m.heads", None, 4), Attribute("m.size", None, 6)


def test_arithmetic_keeps_value_and_formula() -> None:
    h, d = Traced(4, HEADS), Traced(6, SIZE)
    assert (h * d, d // 4, 2 + h, d - h, 10 - h, -h) == (24, 1, 6, 2, 6, -4)
    assert source_of(h * d) == Formula("*", HEADS, SIZE)
    assert source_of(2 + h) == Formula("+", 2, HEADS)
    assert source_of((h * d) // 3) == Formula("//", Formula("*", HEADS, SIZE), 3)


def test_what_is_not_followed_gives_plain_numbers() -> None:
    d = Traced(6, SIZE)
    for value in (d * 0.5, d**-0.5, d / 2, int(d), d % 4, int(d * 0.5)):
        assert not isinstance(value, Traced)
    assert d * 0.5 == 3.0


def test_it_passes_where_an_int_is_wanted() -> None:
    d = Traced(6, SIZE)
    assert [0] * d == [0] * 6
    assert list(range(d))[-1] == 5
    assert torch.zeros(d, 2).shape == (6, 2)
    assert json.dumps([d]) == "[6]"
    assert {6: "x"}[d] == "x"
    assert type(copy.deepcopy(d)) is int


def test_only_comparisons_of_two_traced_integers_that_hold_are_told() -> None:
    told: list[tuple[object, object]] = []
    h, d = (Traced(6, s, lambda a, b: told.append((a, b))) for s in (HEADS, SIZE))
    assert h == 6
    assert h == d
    assert h != Traced(5, SIZE)
    assert told == [(HEADS, SIZE)]
