from __future__ import annotations

import itertools

import numpy as np
import pytest

from gracile.errors import ConfigError
from gracile.knapsack import BINS, choose_options

Options = list[list[tuple[float, float]]]


def total(options: Options, picked: tuple[int, ...] | list[int]) -> tuple[float, float]:
    rows = [item[i] for item, i in zip(options, picked)]
    return sum(loss for loss, _ in rows), sum(saved for _, saved in rows)


def brute_force(options: Options, amount: float) -> float:
    """The least loss over all choices that save the amount."""
    choices = itertools.product(*(range(len(item)) for item in options))
    return min(loss for loss, saved in (total(options, c) for c in choices) if saved >= amount)


def staircase(seed: int, items: int = 5, levels: int = 4) -> Options:
    """Losses in any order, savings in uneven jumps, some of them negative."""
    generator = np.random.default_rng(seed)
    return [
        [(0.0, 0.0), *((float(a), float(b)) for a, b in zip(generator.random(levels), generator.normal(2, 2, levels)))]
        for _ in range(items)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    options = staircase(seed)
    most = sum(max(saved for _, saved in item) for item in options)
    for amount in (share * most for share in (0.1, 0.4, 0.7, 0.95)):
        loss, saved = total(options, choose_options(options, amount))
        assert saved >= amount
        # Savings are rounded down to bins: at worst the best choice of a bin more for each item is found instead.
        assert brute_force(options, amount) <= loss
        slack = amount * (1 + len(options) / BINS)
        assert loss <= (brute_force(options, slack) if slack <= most else np.inf)


def test_equal_savings_take_the_cheaper_and_a_wide_jump_beats_many_small_steps() -> None:
    assert choose_options([[(0.0, 0.0), (2.0, 5.0), (1.0, 5.0)]], 5.0) == [2]
    # By the ratio of savings to loss the first item comes first, and then the second is needed as well.
    assert choose_options([[(0.0, 0.0), (1.0, 6.0)], [(0.0, 0.0), (2.0, 10.0)]], 10.0) == [0, 1]


def test_nothing_asked_loses_nothing_and_too_much_asked_gives_all_there_is() -> None:
    options = [[(0.0, 0.0), (1.0, 6.0)], [(0.5, 3.0), (0.7, 1.0)]]
    assert choose_options(options, 0.0) == [0, 0]
    assert choose_options(options, 9.0) == [1, 0]
    assert choose_options(options, 100.0) == [1, 0]
    assert choose_options([], 1.0) == []


def test_an_amount_that_needs_what_rounding_took_is_still_saved() -> None:
    third = [(0.0, 0.0), (1.0, 1 / 3)]
    picked = choose_options([third] * 3, 1 - 1e-6)
    assert picked == [1, 1, 1]


def test_an_item_without_options_is_refused() -> None:
    with pytest.raises(ConfigError, match="no options"):
        choose_options([[(0.0, 0.0)], []], 1.0)
