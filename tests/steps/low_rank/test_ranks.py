"""Ranks and their choice, by hand."""

from __future__ import annotations

import itertools

import pytest

import gracile as gc
from gracile.steps.low_rank.ranks import Option, choose_ranks, not_dominated, options_of, ranks_of
from gracile.steps.low_rank.select import Candidate, Rank


@pytest.mark.parametrize(
    ("sides", "levels", "multiple_of", "expected"),
    [
        ((64, 64), 1, 1, [16, 31]),
        ((64, 64), 3, 1, [8, 16, 23, 31]),
        ((64, 64), 3, 8, [8, 16, 24]),
        ((64, 64), 3, 16, [8, 16, 24]),  # 31 holds 16 once
        ((512, 512), 3, 16, [64, 128, 192, 240]),
        ((2, 64), 8, 16, [1]),
    ],
)
def test_ranks_are_even_steps_below_where_nothing_is_saved(
    sides: tuple[int, int], levels: int, multiple_of: int, expected: list[int]
) -> None:
    assert ranks_of(Candidate("a", "Linear", *sides, 0, 4), levels, multiple_of) == [Rank(r) for r in expected]


def test_ranks_along_the_sides_are_further_ranks() -> None:
    """64 x 64 of kernel 3 x 3: 4096 · 9 weights are 57.6 ranks of 64 + 576, and 96 of 192 + 192."""
    candidate = Candidate("a", "Conv2d", 64, 576, 0, 4, kernel=(3, 3))
    assert ranks_of(candidate, 1, 1) == [Rank(28), Rank(57), Rank(48, True), Rank(95, True)]


def test_of_ranks_that_save_as_much_the_nearer_is_measured_alone() -> None:
    errors = {Rank(1): 5.0, Rank(2): 3.0, Rank(3): 1.0, Rank(1, True): 2.0, Rank(2, True): 0.5}
    saved = {Rank(1): 9.0, Rank(2): 6.0, Rank(3): 3.0, Rank(1, True): 8.0, Rank(2, True): 3.0}
    assert not_dominated(errors, saved) == [Rank(1), Rank(1, True), Rank(2, True)]


@pytest.mark.parametrize(
    ("budget", "saved"), [(None, 1200.0), (gc.Parameters(0.5), 1200.0), (gc.Bytes(0.5), 4800.0), (gc.MACs(0.5), 6000.0)]
)
def test_savings_are_in_the_unit_of_the_budget(budget: gc.MACs | None, saved: float) -> None:
    """60 x 40 at rank 12: 1200 of 2400 weights, at 5 positions each."""
    options = options_of([Candidate("a", "Conv2d", 60, 40, 12000, 4)], {"a": {Rank(12): 0.5, Rank(24): 0.2}}, budget)
    assert options == {"a": [Option(None, 0.0, 0.0), Option(Rank(12), 0.5, saved)]}  # at rank 24 nothing is saved


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_choice_is_the_best_of_all(power: float) -> None:
    table = {
        "a": [Option(None, 0.0, 0.0), Option(Rank(9), 0.1, 3.0), Option(Rank(5), 0.4, 5.0), Option(Rank(1), 2.0, 8.0)],
        "b": [Option(None, 0.0, 0.0), Option(Rank(9), 0.3, 2.0), Option(Rank(1), 0.5, 6.0)],
        "c": [Option(None, 0.0, 0.0), Option(Rank(4), 0.05, 1.0)],
    }
    for amount in (0.9, 3.9, 8.9, 11.9, 15.0):  # the knapsack may pass over what saves just the amount
        best = min(
            (c for c in itertools.product(*table.values()) if sum(o.saved for o in c) >= amount),
            key=lambda c: sum(o.loss**power for o in c),
        )
        wanted = {name: option.rank for name, option in zip(table, best) if option.rank is not None}
        assert choose_ranks(table, amount, power) == wanted
