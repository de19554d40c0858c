"""Numbers for tensors that may be let go: unlike `id`, one is never given twice."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

from torch import Tensor


class Identity:
    """One number for each tensor, as long as it lives, without keeping it alive.

    on_death: called with the number of a tensor that is gone.
    """

    def __init__(self, on_death: Callable[[int], None]) -> None:
        self._on_death = on_death
        self._counter = itertools.count()
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; the next one for a tensor never seen before."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        place, number = id(tensor), next(self._counter)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if self._known.get(place, (None,))[0] is reference:
                del self._known[place]
            del self._references[number]
            self._on_death(number)

        self._references[number] = weakref.ref(tensor, forget)
        self._known[place] = self._references[number], number
        return number

    def tensor(self, number: int) -> Tensor | None:
        """The tensor of a number, if it lives."""
        reference = self._references.get(number)
        return None if reference is None else reference()
