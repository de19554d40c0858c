"""Integers that remember where they came from, and what they must become when the axes that they size are cut.

Every integer attribute of the model is replaced during the trace by a `Traced` integer, and tensor sizes are returned
as such. Used in `view`, `split`, `zeros` and the like, they say which attribute sized which dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gracile.graph.axes import Expr


@dataclass(frozen=True)
class Attribute:
    """An integer that an object of the model holds, named by a dotted path; `item` is its place in a tuple."""

    path: str
    item: int | None
    value: int


@dataclass(frozen=True, eq=False)
class Size:
    """The size of a dimension."""

    expr: Expr


@dataclass(frozen=True)
class Formula:
    """Two integers combined: "+", "-", "*" or "//"."""

    operator: str
    left: Source
    right: Source


Source = int | Attribute | Size | Formula
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


@dataclass(frozen=True)
class Constraint:
    """What the forward computes (`source`) must equal the size of a dimension, or a number that does not change."""

    source: Source
    target: Expr | int
    where: str


class Traced(int):
    """An int with its source; `+ - * //` keep track, anything else gives a plain int."""

    source: Source
    on_equal: Callable[[Source, Source], None] | None

    def __new__(cls, value: int, source: Source, on_equal: Callable[[Source, Source], None] | None = None) -> Traced:
        self = super().__new__(cls, value)
        self.source = source
        self.on_equal = on_equal
        return self

    def _combine(self, symbol: str, left: int, right: int) -> Any:
        if not isinstance(left, int) or not isinstance(right, int):
            return NotImplemented
        value = OPERATORS[symbol](int(left), int(right))
        return Traced(value, Formula(symbol, source_of(left), source_of(right)), self.on_equal)

    def __add__(self, other: int) -> Any:
        return self._combine("+", self, other)

    def __radd__(self, other: int) -> Any:
        return self._combine("+", other, self)

    def __sub__(self, other: int) -> Any:
        return self._combine("-", self, other)

    def __rsub__(self, other: int) -> Any:
        return self._combine("-", other, self)

    def __mul__(self, other: int) -> Any:
        return self._combine("*", self, other)

    def __rmul__(self, other: int) -> Any:
        return self._combine("*", other, self)

    def __floordiv__(self, other: int) -> Any:
        return self._combine("//", self, other)

    def __rfloordiv__(self, other: int) -> Any:
        return self._combine("//", other, self)

    def __neg__(self) -> Any:
        return self._combine("-", 0, self)

    def __eq__(self, other: object) -> bool:
        """A comparison of two traced integers that holds must hold after a cut: the forward branches on it."""
        equal = int(self) == other
        if equal and isinstance(other, Traced) and self.on_equal is not None:
            self.on_equal(self.source, other.source)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)


def source_of(value: int) -> Source:
    """Where an integer came from; a plain one is its own source."""
    return value.source if isinstance(value, Traced) else int(value)
