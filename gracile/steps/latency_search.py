"""A choice to a budget of latency: predicted, measured, and predicted again by what the measurement taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

#: The latency aimed at, and the lowest that is near enough, as shares of the budget.
AIM, NEAR = 0.985, 0.95
#: Corrections towards the budget, and further ones while it is still exceeded.
CORRECTIONS, ATTEMPTS = 3, 8

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Found(Generic[Choice]):
    """choice: the slowest within the limit, or None. nearest: the lowest share of the latency that was measured.

    correction: what a choice saved by measurement, as a multiple of what was predicted.
    """

    choice: Choice | None
    nearest: float
    correction: float


def search_within(
    limit: float,
    least: Callable[[float], Choice],
    predict: Callable[[Choice], float],
    measure: Callable[[Choice], float],
    correction: float = 1.0,
) -> Found[Choice]:
    """The choice that takes at most `limit` of the whole model's latency, as measured, and little less.

    least: share of the latency that is predicted to be saved -> the choice of least loss. predict: the share that a
    choice is predicted to save. measure: the share of the latency that it takes.
    """
    best: tuple[float, Choice] | None = None
    nearest = 1.0
    tried: list[Choice] = []
    goal = AIM * limit
    for attempt in range(ATTEMPTS):
        choice = least((1 - goal) / correction)
        if choice in tried:
            if best is not None:
                break
            goal -= 0.03 * limit  # the same again, too slow: ask for more
            continue
        tried.append(choice)
        measured = measure(choice)
        nearest = min(nearest, measured)
        if measured <= limit and (best is None or measured > best[0]):
            best = measured, choice
        if best is not None and (attempt >= CORRECTIONS or best[0] >= NEAR * limit):
            break
        predicted = predict(choice)
        if predicted > 0 and measured < 1:
            correction = (1 - measured) / predicted
    return Found(best[1] if best is not None else None, nearest, correction)
