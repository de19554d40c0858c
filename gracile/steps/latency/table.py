"""Latency tables: what a group saves of the model's latency at each width, measured inside the model on the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gracile.context import Context
from gracile.errors import ConfigError, TargetError
from gracile.files import sha256_json
from gracile.graph import Group, Trace, cut_macs, tied_sets
from gracile.steps.latency.cache import LatencyCache
from gracile.steps.latency.timing import Timer
from gracile.steps.pruning.budget import cut_copy

#: Seconds of timing at least for one width, beside the whole model.
EACH = 0.4


@dataclass(frozen=True)
class LatencyTable:
    """saved: group -> units removed -> share of the whole model's latency that goes when this group alone is cut.

    timed: how many widths were measured for it now, the others being known. failed: what could not be cut or exported,
    with the reason; no further width of these groups was tried.
    """

    saved: Mapping[str, Mapping[int, float]]
    timed: int = 0
    failed: tuple[str, ...] = ()

    def share(self, group: str, removed: int) -> float:
        """The share saved by this many units less; between two widths that were measured, linear."""
        row = {0: 0.0, **self.saved.get(group, {})}
        if removed in row:
            return row[removed]
        below = max(count for count in row if count < removed)
        above = min((count for count in row if count > removed), default=below)
        if above == below:
            return row[below]
        return row[below] + (row[above] - row[below]) * (removed - below) / (above - below)

    def within(self, share: float, whole: Trace, part: Trace) -> LatencyTable:
        """The table of the model without some of its blocks, not measured but derived.

        share: that model's latency, as a share of the whole one's. whole, part: the traces of both. A cut saves what it
        did in the whole model, in proportion to the multiply-accumulates that it still saves.
        """
        left = {group.name for group in part.groups}
        saved = {
            name: {
                removed: saving / share * saved_macs(part, name, removed) / (saved_macs(whole, name, removed) or 1)
                for removed, saving in row.items()
            }
            for name, row in self.saved.items()
            if name in left
        }
        return LatencyTable(saved)


def saved_macs(traced: Trace, name: str, removed: int) -> int:
    """Multiply-accumulates that go when this group alone, or its tied set, loses so many units each."""
    group = traced.group(name)
    tied = [g for g in traced.groups if g.frozen is None and g.tied_count == group.tied_count is not None]
    keep = {g.name: list(range(g.units - removed)) for g in tied or [group]}
    return cut_macs(traced, {}) - cut_macs(traced, keep)


def measure_latency_table(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    counts: Mapping[str, Sequence[int]],
    timer: Timer,
    cache: LatencyCache,
    context: Context,
) -> LatencyTable:
    """What each group saves with so many units removed, `counts` by group name.

    Groups that must keep one number of units lose as many each, and are one group here (`tied_sets`).
    Groups between equal layers on equal inputs save the same, so that they are cut together and share one measurement,
    in proportion to the multiply-accumulates that each would save alone. The rest of the model stays as it is.
    """
    sets = tied_sets(groups)
    alike: dict[str, list[str]] = {}
    for name, tied in sets.items():
        found = sorted(signature_of(model, traced, group) for group in tied)
        alike.setdefault(found[0] if len(found) == 1 else sha256_json(found)[:24], []).append(name)
    total = sum(len(counts[names[0]]) for names in alike.values())
    saved: dict[str, dict[int, float]] = {name: {} for name in sets}
    done, timed, failed = 0, 0, []
    for signature, names in alike.items():
        for removed in counts[names[0]]:
            each = {name: {g.name: list(range(g.units - removed)) for g in sets[name]} for name in names}
            together = {group: kept for part in each.values() for group, kept in part.items()}
            share = cache.get(signature, removed)
            if share is None:
                try:
                    share = 1 - timer.relative(cut_copy(model, traced, together), seconds=EACH)
                except (ConfigError, TargetError) as error:
                    failed.append(f"{names[0]} without {removed} units: {str(error).splitlines()[0]}")
                    break
                timed += 1
                cache.put(signature, removed, share)
            for name, part in _parts(traced, each, together).items():
                saved[name][removed] = share * part
            done += 1
            context.progress("latency table", done, total)
    return LatencyTable(saved, timed, tuple(failed))


def signature_of(model: nn.Module, traced: Trace, group: Group) -> str:
    """A hash that is equal for groups whose cut does the same to the work of the model: the names of layers aside."""
    layers = {layer.name: layer for layer in traced.layers}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    rows: list[Any] = []
    for member in group.members:
        name, _, leaf = member.tensor.rpartition(".")
        shape = list(tensors[member.tensor].shape) if member.tensor in tensors else []
        row: list[Any] = [leaf, shape, member.axis, member.role, list(member.positions.shape)]
        if name in layers:
            info = layers[name]
            settings = model.get_submodule(name).extra_repr()
            row += [info.kind, settings, list(info.input_shape), list(info.output_shape), info.calls]
        rows.append(row)
    return sha256_json([group.kind, group.units, sorted(rows, key=repr)])[:24]


def _parts(
    traced: Trace, each: Mapping[str, Mapping[str, Sequence[int]]], together: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Of what cuts save together, what each saves alone; more than 1 in sum where they share layers."""
    whole = cut_macs(traced, {})
    joint = whole - cut_macs(traced, together)
    if joint <= 0:
        return dict.fromkeys(each, 1 / len(each))
    return {name: (whole - cut_macs(traced, keep)) / joint for name, keep in each.items()}
