"""Groups: the units that can be cut, each with the slices of every parameter that it takes along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gracile.graph.axes import COUNTERS, Atom, Expr, atoms, freeze, resolve, size
from gracile.graph.integers import Attribute, Constraint, Size
from gracile.graph.positions import occurs_once_per_product, unit_positions
from gracile.graph.recorder import Recorder
from gracile.graph.solve import Solver

Kind = Literal["channels", "heads", "head_dim", "hidden"]
Role = Literal["producer", "consumer"]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter or buffer that the units of a group run along.

    tensor: its name. axis: which axis.
    positions: [units, k] int64, the positions along the axis that each unit carries.
    role: "consumer" where a product sums over the axis (inputs of a layer), else "producer" (outputs, biases, norms).
    """

    tensor: str
    axis: int
    positions: Tensor
    role: Role


@dataclass(frozen=True, eq=False)
class Group:
    """Units that exist in several parameters at once and can only be cut from all of them.

    name: after the layer that makes them. units: how many. kind: what a unit is.
    frozen: why none can be cut; None where they can.
    exact: why cutting units differs from zeroing them in all consumers; None where both give the same outputs.
    tied_count: groups with the same key must keep the same number of units; None for no such tie.
    multiple_of: what the number of units kept must be a multiple of.
    """

    name: str
    units: int
    kind: Kind
    members: tuple[Member, ...]
    frozen: str | None = None
    exact: str | None = None
    tied_count: str | None = None
    multiple_of: int = 1


def tied_sets(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups by what must keep one number of units, each set by the least of its names; an untied one is alone."""
    sets: dict[str, list[Group]] = {}
    for group in groups:
        sets.setdefault(group.tied_count or f"\0{group.name}", []).append(group)
    return {min(group.name for group in members): members for members in sets.values()}


def settle(recorder: Recorder, solver: Solver) -> dict[Atom, str]:
    """Freeze what could not be cut without breaking the forward; gives the count that the free atoms share, by key."""
    used = {state[0] for event in recorder.events for state in event.reads}
    produced: set[Atom] = set()
    for name, dims in recorder.axes.items():
        for axis, dim in enumerate(dims):
            if recorder.ids[name] not in used:
                freeze(dim, "it was not used by the model on this batch")
            for atom in atoms(dim):
                if not occurs_once_per_product(dim, atom):
                    freeze((atom,), "it occurs twice in one axis")
            if (name, axis) in recorder.producers:
                produced.update(atoms(dim))
    for dims in recorder.axes.values():
        for dim in dims:
            for atom in atoms(dim):
                if atom not in produced:
                    freeze((atom,), "no layer makes it: it is read from parameters or buffers alone")
    ties = _tied_atoms(solver)
    _freeze_contradicted(_free_atoms(recorder), ties, solver)
    return {atom: key for key, members in ties.items() if len(members) > 1 for atom in members}


def _free_atoms(recorder: Recorder) -> list[Atom]:
    found: dict[Atom, None] = {}
    for dims in recorder.axes.values():
        for dim in dims:
            found.update(dict.fromkeys(atom for atom in atoms(dim) if not atom.frozen))
    return list(found)


def _tied_atoms(solver: Solver) -> dict[str, list[Atom]]:
    """Atoms that must keep the same count, because one integer sizes them all."""
    parent: dict[Atom, Atom] = {}
    label: dict[Atom, str] = {}

    def root(atom: Atom) -> Atom:
        while (above := parent.setdefault(atom, atom)) is not atom:
            atom = above
        return atom

    for key, first, second in _equal_sizes(solver):
        left, right = _without_common(first, second)
        if len(left) == 1 and len(right) == 1 and isinstance(left[0], Atom) and isinstance(right[0], Atom):
            a, b = root(left[0]), root(right[0])
            parent[b] = a
            label[a] = label.get(a) or label.get(b) or key
    classes: dict[Atom, list[Atom]] = {}
    for atom in list(parent):
        classes.setdefault(root(atom), []).append(atom)
    names: set[str] = set()
    return {_unique(label[top], names): members for top, members in classes.items()}


def _equal_sizes(solver: Solver) -> Iterable[tuple[str, Expr, Expr]]:
    for attribute, dims in solver.direct().items():
        for dim in dims[1:]:
            yield _key(attribute), dims[0], dim
    for i, c in enumerate(solver.constraints):
        if isinstance(c.source, Size) and not isinstance(c.target, int):
            yield f"{c.where} #{i}", resolve(c.source.expr), resolve(c.target)


def _key(attribute: Attribute) -> str:
    return attribute.path if attribute.item is None else f"{attribute.path}[{attribute.item}]"


def _without_common(first: Expr, second: Expr) -> tuple[list[object], list[object]]:
    """Both products without the factors that they share."""
    left: list[object] = list(first)
    right: list[object] = []
    for factor in second:
        if factor in left:
            left.remove(factor)
        else:
            right.append(factor)
    return left, right


def _freeze_contradicted(free: Sequence[Atom], ties: Mapping[str, Sequence[Atom]], solver: Solver) -> None:
    """Cut each atom, with those tied to it, in thought; freeze it where an integer of the forward would be wrong."""
    together = {atom: list(members) for members in ties.values() for atom in members}
    changed = True
    while changed:
        changed = False
        for atom in free:
            if atom.frozen:
                continue
            cut = together.get(atom, [atom])
            reason = next(
                (f"its count is tied to an axis that cannot be cut: {a.frozen}" for a in cut if a.frozen), None
            )
            reason = reason or _contradiction(cut, solver)
            if reason:
                freeze(tuple(cut), reason)
                changed = True


def _contradiction(cut: Sequence[Atom], solver: Solver) -> str | None:
    units = cut[0].size
    for count in {units - 1, units // 2}:
        if count < 1:
            continue
        violated = solver.solve(dict.fromkeys(cut, count)).violated
        if violated:
            return _explain(violated[0])
    return None


def _explain(c: Constraint) -> str:
    if isinstance(c.source, int):
        return f"the forward fixes a size that depends on it to the number {c.source} ({c.where})"
    return f"the forward computes a size that would no longer fit ({c.where})"


def build_groups(recorder: Recorder, ties: Mapping[Atom, str]) -> list[tuple[Group, Atom]]:
    """Every group with the atom it stands for, in the order in which their first layers ran."""
    where: dict[Atom, list[tuple[str, int, Expr]]] = {}
    for name, dims in recorder.axes.items():
        for axis, dim in enumerate(dims):
            for atom in dict.fromkeys(atoms(dim)):
                where.setdefault(atom, []).append((name, axis, dim))
    order = {layer: i for i, layer in enumerate(recorder.call_order)}
    names: set[str] = set()
    found: list[tuple[int, Group, Atom]] = []
    for atom, places in sorted(where.items(), key=lambda entry: bool(entry[0].frozen)):  # the free are named first
        if atom.frozen and not _matters(recorder, atom, places):
            continue
        members = tuple(_member(recorder, atom, *place) for place in places)
        kind = _kind(atom)
        layer, rank = _home(recorder, members, order, kind)
        name = _unique(layer if kind == "channels" else f"{layer}:{kind}", names)
        group = Group(name, atom.size, kind, members, atom.frozen, atom.inexact, ties.get(atom), atom.multiple)
        found.append((rank, group, atom))
    return [(group, atom) for _, group, atom in sorted(found, key=lambda entry: entry[0])]


def _matters(recorder: Recorder, atom: Atom, places: Sequence[tuple[str, int, Expr]]) -> bool:
    """Whether a frozen atom is worth a line: a layer makes or consumes it, and it is no mere count inside an axis."""
    return any(
        ((name, axis) in recorder.producers or (name, axis) in recorder.consumers)
        and (atom.frozen not in COUNTERS or atom.size == size(dim))
        for name, axis, dim in places
    )


def _member(recorder: Recorder, atom: Atom, name: str, axis: int, dim: Expr) -> Member:
    role: Role = "consumer" if (name, axis) in recorder.consumers else "producer"
    return Member(name, axis, unit_positions(dim, atom), role)


def _kind(atom: Atom) -> Kind:
    for kind in ("hidden", "heads", "head_dim"):
        if kind in atom.kinds:
            return kind  # type: ignore[return-value]
    return "channels"


def _home(recorder: Recorder, members: Sequence[Member], order: Mapping[str, int], kind: Kind) -> tuple[str, int]:
    """The layer a group is named after, and when it ran: the first producer; for heads, the module around them all."""
    made = [m for m in members if (m.tensor, m.axis) in recorder.producers]
    layers = [m.tensor.rpartition(".")[0].partition(".parametrizations.")[0] for m in made or members]
    ranked = sorted(layers, key=lambda layer: order.get(layer, len(order)))
    rank = order.get(ranked[0], len(order))
    if kind in ("heads", "head_dim"):
        parts = [m.tensor.rpartition(".")[0].split(".") for m in members]
        common = [same[0] for same in zip(*parts) if len(set(same)) == 1]
        if common:
            return ".".join(common), rank
    return ranked[0] or "model", rank


def _unique(name: str, taken: set[str]) -> str:
    candidate, n = name, 2
    while candidate in taken:
        candidate, n = f"{name}#{n}", n + 1
    taken.add(candidate)
    return candidate
