"""Axis expressions: what a tensor's dimension is made of, and how two of them are found to be the same.

A dimension is a product of factors, outer to inner, as a tuple; the empty tuple is a dimension of size 1. A factor is an
`Atom`, or a `Sum` of dimensions laid end to end (a concatenation). An atom may later be refined: replaced everywhere by
an expression of new atoms. Whatever cannot be understood is frozen, with the reason, and nothing here raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Union

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
    value: the expression that replaced it; None while it stands for itself.
    """

    __slots__ = ("frozen", "inexact", "kinds", "size", "value")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.inexact: str | None = None
        self.kinds: frozenset[str] = frozenset()
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


Factor = Union[Atom, Sum]
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


def mark_kind(expr: Expr, kind: str) -> None:
    """Note a role in which these atoms were seen."""
    for atom in atoms(expr):
        atom.kinds |= {kind}


def substitute(atom: Atom, expr: Expr) -> None:
    """Replace the atom everywhere by an expression of the same size, which inherits what is known about it."""
    if any(other is atom for other in atoms(expr)):
        reason = "it would have to contain itself"
        freeze((atom,), reason)
        freeze(expr, reason)
        return
    for other in atoms(expr):
        other.frozen = other.frozen or atom.frozen
        other.inexact = other.inexact or atom.inexact
        other.kinds |= atom.kinds
    atom.value = expr


def unify(x: Expr, y: Expr) -> None:
    """Make two dimensions one: after this, a unit cut from one is cut from the other. Freezes both where it cannot."""
    x, y = resolve(x), resolve(y)
    if same(x, y):
        return
    if size(x) != size(y):
        _freeze_both(x, y, SHAPES_DISAGREE)
    elif is_fixed(x):
        freeze(y, frozen_reason(x) or SHAPES_DISAGREE)
    elif is_fixed(y):
        freeze(x, frozen_reason(y) or SHAPES_DISAGREE)
    else:
        _unify_products(list(x), list(y))


def same(x: Expr, y: Expr) -> bool:
    """Whether two resolved expressions are the same, atom for atom."""
    if len(x) != len(y):
        return False
    for a, b in zip(x, y):
        if isinstance(a, Sum) and isinstance(b, Sum):
            if len(a.segments) != len(b.segments) or not all(map(same, a.segments, b.segments)):
                return False
        elif a is not b:
            return False
    return True


def _unify_products(xs: list[Factor], ys: list[Factor]) -> None:
    while xs and ys:
        xs, ys = list(resolve(tuple(xs))), list(resolve(tuple(ys)))
        a, b = xs[0], ys[0]
        if a is b:
            xs, ys = xs[1:], ys[1:]
            continue
        if len(xs) == 1 and isinstance(a, Atom):
            substitute(a, tuple(ys))
            return
        if len(ys) == 1 and isinstance(b, Atom):
            substitute(b, tuple(xs))
            return
        if a.size == b.size:
            _unify_factors(a, b)
            xs, ys = xs[1:], ys[1:]
        elif a.size > b.size and a.size % b.size == 0 and (halves := split_factor(a, b.size)):
            xs = [*halves[0], *halves[1], *xs[1:]]
        elif b.size > a.size and b.size % a.size == 0 and (halves := split_factor(b, a.size)):
            ys = [*halves[0], *halves[1], *ys[1:]]
        else:
            _freeze_both(tuple(xs), tuple(ys), SHAPES_DISAGREE)
            return


def _unify_factors(a: Factor, b: Factor) -> None:
    if a is b:
        return
    if isinstance(a, Atom):
        substitute(a, (b,))
    elif isinstance(b, Atom):
        substitute(b, (a,))
    else:
        _unify_sums(a, b)


def _unify_sums(a: Sum, b: Sum) -> None:
    """Cut both at the nearer boundary, again and again."""
    left, right = list(a.segments), list(b.segments)
    while left and right:
        n = min(size(left[0]), size(right[0]))
        heads = []
        for side in (left, right):
            first = side.pop(0)
            heads.append(slice_expr(first, 0, n))
            if size(first) > n:
                side.insert(0, slice_expr(first, n, size(first) - n))
        unify(heads[0], heads[1])


def _freeze_both(x: Expr, y: Expr, reason: str) -> None:
    reason = frozen_reason(x) or frozen_reason(y) or reason
    freeze(x, reason)
    freeze(y, reason)


def split_factor(factor: Factor, outer: int) -> tuple[Expr, Expr] | None:
    """Outer and inner part of a factor, the outer of the given size, refining what is inside; None if impossible."""
    inner = factor.size // outer
    if outer * inner != factor.size:
        return None
    if outer == 1:
        return (), (factor,)
    if inner == 1:
        return (factor,), ()
    if isinstance(factor, Atom):
        parts = (Atom(outer, factor.frozen), Atom(inner, factor.frozen))
        if not factor.frozen:
            substitute(factor, parts)
        return parts[:1], parts[1:]
    if is_fixed((factor,)):
        reason = frozen_reason((factor,))
        return fresh(outer, reason), fresh(inner, reason)
    if any(size(segment) % inner for segment in factor.segments):
        return None
    outers: list[Expr] = []
    shared: Expr | None = None
    for segment in factor.segments:
        parted = split_expr(segment, size(segment) // inner)
        if parted is None:
            return None
        outers.append(parted[0])
        if shared is None:
            shared = parted[1]
        else:
            unify(shared, parted[1])
    if all(size(part) == 1 for part in outers):
        return fresh(outer, COUNTS_STACKED), resolve(shared or ())
    return concatenate(tuple(outers)), resolve(shared or ())


def split_expr(expr: Expr, outer: int) -> tuple[Expr, Expr] | None:
    """Outer and inner part of a dimension, the outer of the given size; None if the factors do not divide so."""
    taken: list[Factor] = []
    rest = list(resolve(expr))
    have = 1
    while have < outer:
        if not rest:
            return None
        first = rest.pop(0)
        if outer % (have * first.size) == 0:
            taken.append(first)
            have *= first.size
            continue
        need = outer // have
        if need * have != outer or first.size % need:
            return None
        halves = split_factor(first, need)
        if halves is None:
            return None
        return (*taken, *halves[0]), (*halves[1], *rest)
    return tuple(taken), tuple(rest)


def slice_expr(expr: Expr, start: int, length: int) -> Expr:
    """The part of a dimension from `start` over `length` positions, refining an atom into parts laid end to end."""
    expr = resolve(expr)
    n = size(expr)
    if length == n:
        return expr
    if length == 0:
        return (Atom(0, "it is empty"),)
    if is_fixed(expr):
        return fresh(length, frozen_reason(expr) or SHAPES_DISAGREE)
    first, rest = expr[0], expr[1:]
    if rest:
        inner = size(rest)
        if start % inner == 0 and length % inner == 0:
            return (*slice_expr((first,), start // inner, length // inner), *rest)
        if start // inner == (start + length - 1) // inner and is_fixed((first,)):
            return slice_expr(rest, start % inner, length)
        freeze(expr, "a slice of it cuts across its inner parts")
        return fresh(length, "a slice of it cuts across its inner parts")
    if isinstance(first, Atom):
        parts = tuple(fresh(k) for k in (start, length, n - start - length) if k > 0)
        substitute(first, (Sum(parts),))
        return parts[1 if start > 0 else 0]
    pieces: list[Expr] = []
    at = 0
    for segment in first.segments:
        low, high = max(start, at), min(start + length, at + size(segment))
        if low < high:
            pieces.append(slice_expr(segment, low - at, high - low))
        at += size(segment)
    return concatenate(tuple(pieces))
