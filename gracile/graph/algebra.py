"""How dimensions are made one, split and sliced, refining the atoms in them.

Whatever cannot be followed is frozen, with the reason; nothing here raises.
"""

from __future__ import annotations

from math import lcm

from gracile.graph.axes import (
    COUNTS_STACKED,
    SHAPES_DISAGREE,
    Atom,
    Expr,
    Factor,
    Sum,
    atoms,
    concatenate,
    freeze,
    fresh,
    frozen_reason,
    is_fixed,
    resolve,
    size,
)


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
        other.multiple = lcm(other.multiple, atom.multiple)
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
