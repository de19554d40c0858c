"""What the integers of a model become after a cut, and which of them the forward would then contradict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gracile.graph.axes import Atom, Expr, Sum, atoms, resolve
from gracile.graph.integers import OPERATORS, Attribute, Constraint, Formula, Size, Source
from gracile.graph.positions import kept_count


@dataclass(frozen=True)
class Solution:
    """Attributes that change, with their new values, and constraints that cannot be met."""

    attributes: dict[Attribute, int]
    violated: list[Constraint]


class Solver:
    """Solves the constraints of one traced model for any cut of its atoms."""

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        unique = {(_key(c.source), _key(c.target)): c for c in constraints}
        self.constraints = [c for c in unique.values() if _can_change(c)]
        self._atoms = [set(constraint_atoms(c)) for c in self.constraints]
        self._attributes = [set(attributes_in(c.source)) for c in self.constraints]

    def direct(self) -> dict[Attribute, list[Expr]]:
        """The dimensions whose size each attribute states by itself."""
        found: dict[Attribute, list[Expr]] = {}
        for c in self.constraints:
            if isinstance(c.source, Attribute) and not isinstance(c.target, int):
                found.setdefault(c.source, []).append(resolve(c.target))
        return found

    def solve(self, counts: Mapping[Atom, int]) -> Solution:
        """New attribute values when each atom keeps that many units."""
        chosen = self._touched(counts)
        values: dict[Attribute, int] = {}
        for c in chosen:
            if isinstance(c.source, Attribute):
                values.setdefault(c.source, _target(c, counts))
        while self._infer(chosen, counts, values):
            pass
        violated = [c for c in chosen if _evaluate(c.source, counts, values) != _target(c, counts)]
        return Solution({a: v for a, v in values.items() if v != a.value}, violated)

    def _touched(self, counts: Mapping[Atom, int]) -> list[Constraint]:
        """Constraints with these atoms, and all that share an attribute with them."""
        changing = {atom for atom, n in counts.items() if n != atom.size}
        linked: set[Attribute] = set()
        chosen: set[int] = set()
        grown = True
        while grown:
            grown = False
            for i in range(len(self.constraints)):
                if i not in chosen and (self._atoms[i] & changing or self._attributes[i] & linked):
                    chosen.add(i)
                    linked |= self._attributes[i]
                    grown = True
        return [self.constraints[i] for i in sorted(chosen)]

    def _infer(self, chosen: list[Constraint], counts: Mapping[Atom, int], values: dict[Attribute, int]) -> bool:
        """Find one attribute from a formula in which it is the only unknown, or a factor of a product."""
        for c in chosen:
            unknown = [a for a in attributes_in(c.source) if a not in values]
            target = _target(c, counts)
            if not unknown or _evaluate(c.source, counts, values) == target:
                continue
            if len(unknown) == 1:
                found = _invert(c.source, unknown[0], target, counts, values)
                if found is not None:
                    values[unknown[0]] = found
                    return True
            elif _infer_product(c, counts, values):
                return True
        return False


def _infer_product(c: Constraint, counts: Mapping[Atom, int], values: dict[Attribute, int]) -> bool:
    """a·b over a dimension whose outer factors are a and inner ones b."""
    source, target = c.source, c.target
    if isinstance(target, int) or not isinstance(source, Formula) or source.operator != "*":
        return False
    left, right = source.left, source.right
    if not isinstance(left, Attribute) or not isinstance(right, Attribute):
        return False
    outer: list[Atom | Sum] = []
    rest = list(resolve(target))
    have = 1
    while rest and have < left.value:
        factor = rest.pop(0)
        outer.append(factor)
        have *= factor.size
    if have != left.value:
        return False
    values[left], values[right] = kept_count(tuple(outer), counts), kept_count(tuple(rest), counts)
    return True


def _evaluate(source: Source, counts: Mapping[Atom, int], values: Mapping[Attribute, int]) -> int | None:
    if isinstance(source, int):
        return source
    if isinstance(source, Attribute):
        return values.get(source, source.value)
    if isinstance(source, Size):
        return kept_count(source.expr, counts)
    left, right = _evaluate(source.left, counts, values), _evaluate(source.right, counts, values)
    if left is None or right is None or (source.operator == "//" and right == 0):
        return None
    return OPERATORS[source.operator](left, right)


def _invert(
    source: Source, unknown: Attribute, value: int, counts: Mapping[Atom, int], values: Mapping[Attribute, int]
) -> int | None:
    """The value of the one unknown attribute for which the formula gives `value`."""
    if source == unknown:
        return value
    if not isinstance(source, Formula):
        return None
    on_left = unknown in set(attributes_in(source.left))
    if on_left and unknown in set(attributes_in(source.right)):
        return None
    inside, outside = (source.left, source.right) if on_left else (source.right, source.left)
    known = _evaluate(outside, counts, values)
    if known is None:
        return None
    if source.operator == "+":
        wanted = value - known
    elif source.operator == "-":
        wanted = value + known if on_left else known - value
    elif source.operator == "*":
        if known == 0 or value % known:
            return None
        wanted = value // known
    elif on_left:
        wanted = value * known
    elif value == 0:
        return None
    else:
        wanted = known // value
    return _invert(inside, unknown, wanted, counts, values)


def _target(c: Constraint, counts: Mapping[Atom, int]) -> int:
    return c.target if isinstance(c.target, int) else kept_count(c.target, counts)


def attributes_in(source: Source) -> Iterator[Attribute]:
    """The attributes of a formula, in order."""
    if isinstance(source, Attribute):
        yield source
    elif isinstance(source, Formula):
        yield from attributes_in(source.left)
        yield from attributes_in(source.right)


def constraint_atoms(c: Constraint) -> Iterator[Atom]:
    """The atoms on which either side of a constraint depends."""
    if not isinstance(c.target, int):
        yield from atoms(c.target)
    yield from _source_atoms(c.source)


def _source_atoms(source: Source) -> Iterator[Atom]:
    if isinstance(source, Size):
        yield from atoms(source.expr)
    elif isinstance(source, Formula):
        yield from _source_atoms(source.left)
        yield from _source_atoms(source.right)


def _can_change(c: Constraint) -> bool:
    return any(not atom.frozen for atom in constraint_atoms(c)) or any(True for _ in attributes_in(c.source))


def _key(item: object) -> object:
    """Equal for constraints that say the same."""
    if isinstance(item, (int, Attribute)):
        return item
    if isinstance(item, Size):
        return ("size", _key(item.expr))
    if isinstance(item, Formula):
        return (item.operator, _key(item.left), _key(item.right))
    if isinstance(item, Sum):
        return ("sum", *(_key(segment) for segment in item.segments))
    if isinstance(item, tuple):
        return tuple(_key(factor) for factor in resolve(item))
    return id(item)
