"""The search for a choice within a latency, on choices that are numbers: what is taken is known."""

from __future__ import annotations

import pytest

from gracile.steps.latency.search import search_within


def steps_of_tenth(wanted: float) -> float:
    """The least of 0.1, 0.2, ... 0.9 that is predicted to save what is wanted; the most where none does."""
    return next((i / 10 for i in range(1, 10) if i / 10 >= wanted - 1e-9), 0.9)


def test_what_is_predicted_rightly_is_found_at_once() -> None:
    measured = []

    def measure(choice: float) -> float:
        measured.append(choice)
        return 1 - choice

    found = search_within(0.6, steps_of_tenth, lambda c: c, measure)
    assert found.choice == 0.5  # 0.985 of the limit is aimed at, which 0.4 misses
    assert found.nearest == pytest.approx(0.5) and found.correction == pytest.approx(1.0)
    assert measured[0] == 0.5 and len(measured) <= 2


@pytest.mark.parametrize("gain", [0.6, 1.5])
def test_wrong_predictions_are_corrected_by_what_was_measured(gain: float) -> None:
    found = search_within(0.8, steps_of_tenth, lambda c: c, lambda c: 1 - gain * c)
    best = max(1 - gain * i / 10 for i in range(1, 10) if 1 - gain * i / 10 <= 0.8)
    assert found.choice is not None and 1 - gain * found.choice == pytest.approx(best)
    assert found.correction == pytest.approx(gain)


def test_what_cannot_be_reached_gives_the_nearest() -> None:
    found = search_within(0.5, steps_of_tenth, lambda c: c, lambda c: 1 - 0.4 * c)
    assert found.choice is None and found.nearest == pytest.approx(1 - 0.4 * 0.9)


def test_choices_that_are_slower_than_the_whole_teach_nothing() -> None:
    found = search_within(0.5, steps_of_tenth, lambda c: c, lambda c: 1.5)
    assert found.choice is None and found.nearest == 1.0 and found.correction == 1.0
