"""Axis expressions: what a dimension of a tensor is made of.

A dimension is a product of factors, outer to inner, as a tuple; the empty tuple is a dimension of size 1. A factor is
an `Atom`, or a `Sum` of dimensions laid end to end (a concatenation). An atom may later be refined: replaced everywhere
by an expression of new atoms (`gracile.graph.algebra`). An atom that cannot be cut is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod

#: Reasons of factors that count something other than neurons; nobody would want to cut them.
COUNTS_POSITIONS = "it counts positions in space or time"
COUNTS_KERNEL = "it counts kernel positions"
COUNTS_GATES = "it counts gates"
COUNTS_GROUPS = "it counts groups"
COUNTS_STACKED = "it counts stacked parts"
COUNTS_REPEATED = "it counts repetitions"
COUNTS_PIXELS = "it counts pixels of a shuffled block"
COUNTERS = frozenset(
    {COUNTS_POSITIONS, COUNTS_KERNEL, COUNTS_GATES, COUNTS_GROUPS, COUNTS_STACKED, COUNTS_REPEATED, COUNTS_PIXELS}
)
MADE_ONE_BY_ONE = "each of its entries is made by itself"
SHAPES_DISAGREE = "its layout here and there cannot be matched"


class Atom:
    """A factor of dimensions, of a fixed size, whose units can be cut unless it is frozen.

    frozen: why no unit can be cut; None where that is allowed.
    inexact: why a cut differs from zeroed units; None where they are the same.
    kinds: names of the roles it was seen in ("heads", "head_dim").
    multiple: the count that stays must be a multiple of this, because a kernel wants aligned rows.
    value: the expression that replaced it; None while it stands for itself.
    """

    __slots__ = ("frozen", "inexact", "kinds", "multiple", "size", "value")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.inexact: str | None = None
        self.kinds: frozenset[str] = frozenset()
        self.multiple = 1
        self.value: Expr | None = None

    def __repr__(self) -> str:
        return f"{'!' if self.frozen else ''}{self.size}"


@dataclass(frozen=True, eq=False, repr=False)
class Sum:
    """Dimensions laid end to end."""

    segments: tuple[Expr, ...]

    @property
    def size(self) -> int:
        return sum(size(segment) for segment in self.segments)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(show, self.segments)) + ")"


Factor = Atom | Sum
Expr = tuple[Factor, ...]


def show(expr: Expr) -> str:
    """An expression for people: "3·(16 + !8)"; frozen atoms carry an exclamation mark."""
    return "·".join(map(repr, resolve(expr))) or "1"


def fresh(n: int, frozen: str | None = None) -> Expr:
    """A new dimension of size n, frozen if a reason is given; size 1 needs no atom."""
    return () if n == 1 else (Atom(n, frozen),)


def size(expr: Expr) -> int:
    """How many positions the dimension has."""
    return prod(factor.size for factor in expr)


def resolve(expr: Expr) -> Expr:
    """The expression with replaced atoms substituted, nested products and sums flattened, and empty segments gone."""
    out: list[Factor] = []
    for factor in expr:
        if isinstance(factor, Atom):
            if factor.value is None:
                out.append(factor)
            else:
                factor.value = resolve(factor.value)
                out.extend(factor.value)
        else:
            out.extend(concatenate(factor.segments))
    return tuple(out)


def concatenate(segments: tuple[Expr, ...]) -> Expr:
    """The dimension that holds the segments one after the other."""
    flat: list[Expr] = []
    for segment in map(resolve, segments):
        if size(segment) == 0:
            continue
        if len(segment) == 1 and isinstance(segment[0], Sum):
            flat.extend(segment[0].segments)
        else:
            flat.append(segment)
    if not flat:
        return (Atom(0, "it is empty"),)
    return flat[0] if len(flat) == 1 else (Sum(tuple(flat)),)


def atoms(expr: Expr) -> Iterator[Atom]:
    """The atoms of an expression in order of position, repeated where they occur again."""
    for factor in resolve(expr):
        if isinstance(factor, Atom):
            yield factor
        else:
            for segment in factor.segments:
                yield from atoms(segment)


def frozen_reason(expr: Expr) -> str | None:
    """The first reason found for which an atom of the expression is frozen; None if all are free."""
    found = list(atoms(expr))
    return next((atom.frozen for atom in found if atom.frozen), None if found else MADE_ONE_BY_ONE)


def is_fixed(expr: Expr) -> bool:
    """Whether no atom of the expression is free."""
    return all(atom.frozen for atom in atoms(expr))


def freeze(expr: Expr, reason: str) -> None:
    """Forbid cuts of every atom in the expression; the first reason given stays."""
    for atom in atoms(expr):
        atom.frozen = atom.frozen or reason


def mark_inexact(expr: Expr, reason: str) -> None:
    """Note that a cut of these atoms is not the same as zeroed units."""
    for atom in atoms(expr):
        atom.inexact = atom.inexact or reason


def mark_aligned(expr: Expr, multiple: int) -> None:
    """Note that this dimension must stay a multiple of a number; freezes it where it is none now."""
    if size(expr) % multiple:
        freeze(expr, f"its size would have to be a multiple of {multiple}")
    for atom in atoms(expr):
        atom.multiple = lcm(atom.multiple, multiple)


def mark_kind(expr: Expr, kind: str) -> None:
    """Note a role in which these atoms were seen."""
    for atom in atoms(expr):
        atom.kinds |= {kind}
