"""A choice to a budget of latency: predicted, measured, and predicted again by what the measurement taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

#: The latency aimed at, and the lowest that is near enough, as shares of the budget.
AIM, NEAR = 0.985, 0.95
#: Choices measured at most until one is near enough.
ATTEMPTS = 10

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Found(Generic[Choice]):
    """choice: the slowest within the limit, or None. nearest: the lowest share of the latency that was measured.

    correction: what the choice saved by measurement, as a multiple of what was predicted.
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
    choice is predicted to save. measure: the share of the latency that it takes. correction: of the predictions, as an
    earlier search found it. The saving asked for is bracketed between one that was too slow and one that was within.
    """
    aim = AIM * limit
    tried: list[Choice] = []
    # (saving predicted, latency measured) of the most that is still too slow, and of the best choice.
    slow: tuple[float, float] = (0.0, 1.0)
    fast: tuple[float, float] | None = None
    best: Choice | None = None
    nearest, wanted = 1.0, (1 - aim) / correction
    for _ in range(ATTEMPTS):
        choice = least(wanted)
        if choice in tried:
            break
        tried.append(choice)
        predicted, measured = predict(choice), measure(choice)
        nearest = min(nearest, measured)
        if measured > limit:
            slow = max(slow, (predicted, measured))
        elif fast is None or measured > fast[1]:
            fast, best = (predicted, measured), choice
        if fast is not None and fast[1] >= NEAR * limit:
            break
        wanted = _next_wanted(slow, fast, aim)
    if fast is not None and fast[0] > 0:
        correction = (1 - fast[1]) / fast[0]
    return Found(best, nearest, correction)


def _next_wanted(slow: tuple[float, float], fast: tuple[float, float] | None, aim: float) -> float:
    """The saving to ask for next, from what was predicted and measured.

    Between the two in proportion, but at least a tenth of the way from either; beyond `slow`, where nothing was within
    yet, as far as its prediction was wrong, and more.
    """
    if fast is None:
        saved = 1 - slow[1]
        factor = (1 - aim) / saved if saved > 0 else 2.0
        return max(slow[0] * min(factor, 2.0), slow[0] + 0.03 * aim)
    part = (slow[1] - aim) / (slow[1] - fast[1])
    return slow[0] + min(max(part, 0.1), 0.9) * (fast[0] - slow[0])
