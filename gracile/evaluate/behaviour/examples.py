"""The examples that changed most, kept while batches stream past."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExampleChange:
    """One example that changed much: its place in the data, what each model predicted, and how sure it was of it.

    shift: total variation distance of the two predicted distributions, in [0, 1]; for outputs that are no classes, the
    relative error of this example's output, and the predictions are None.
    """

    index: int
    shift: float
    label: int | None = None
    before: int | None = None
    after: int | None = None
    before_probability: float | None = None
    after_probability: float | None = None


class MostChanged:
    """The `size` predictions with the largest shift; of equal ones the earlier. What did not change is left out."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[ExampleChange] = []

    def candidates(self, shift: Tensor) -> list[int]:
        """Positions in this batch that could be among the largest."""
        order = shift.argsort(descending=True, stable=True)[: self._size]
        return [int(i) for i in order if shift[i] > 0]

    def add(self, example: ExampleChange) -> None:
        """Keep the example if it is among the largest so far."""
        self._held = sorted([*self._held, example], key=lambda e: (-e.shift, e.index))[: self._size]

    def items(self) -> tuple[ExampleChange, ...]:
        """Those kept, the largest shift first."""
        return tuple(self._held)
