"""How many units of each group stay, and which by their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.errors import ConfigError
from gracile.goal import Bytes, Parameters
from gracile.graph import Group, tied_sets
from gracile.steps.latency.budget import LatencyBudget
from gracile.steps.pruning.budget import Keep, meet_budget
from gracile.steps.pruning.units import ScoredGroups

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def share_out(
    tables: Mapping[str, Sequence[Level]],
    allocation: MeasuredLoss,
    scored: ScoredGroups,
    step: Prune,
    context: Context,
    fixed: Mapping[str, list[int]] | None = None,
    latency: LatencyBudget | None = None,
) -> Keep:
    """Indices kept of each group that loses any: the widths of the tables that just meet the step's amount.

    Groups without a table stay whole, or as they are in `fixed`. Levels save multiply-accumulates; where the budget is
    of parameters or bytes, weights are counted instead, where the amount is a share of the units, units, and of the
    latency, what the budget's own tables say. Groups that must keep one number of units have one table (`tied_sets`).
    """
    fixed = fixed or {}
    model, groups = scored.model, scored.groups
    sets = {name: members for name, members in tied_sets(groups).items() if name in tables}
    free = [group for members in sets.values() for group in members]

    def keeping(removed: dict[str, int]) -> Keep:
        each = {g.name: removed[name] for name, members in sets.items() if name in removed for g in members}
        return {**fixed, **keep_highest(free, scored.scores, each, step)}

    def saving(amount: float) -> Keep:
        return keeping(allocation.choose(tables, amount))

    if latency is not None:
        exact = {
            n: [level for level in tables[n] if _is_count(members, level.removed, step)] for n, members in sets.items()
        }
        return latency.meet(exact, allocation, keeping)
    if isinstance(step.to, (Parameters, Bytes)):
        each = {name: sum(weights_per_unit(model, group) for group in members) for name, members in sets.items()}
        tables = {
            n: [replace(level, saved=level.removed * each[n]) for level in levels] for n, levels in tables.items()
        }
        total = sum(p.numel() for p in model.parameters())
        return meet_budget(step.to, model, scored.traced, lambda f: saving(f * total), context, scored.batch)
    if step.to is not None:
        macs = scored.traced.macs
        return meet_budget(step.to, model, scored.traced, lambda f: saving(f * macs), context, scored.batch)
    assert step.fraction is not None
    tables = {n: [replace(level, saved=level.removed * len(sets[n])) for level in tables[n]] for n in sets}
    gone = sum(g.units - len(fixed[g.name]) for g in groups if g.name in fixed)
    wanted = step.fraction * sum(g.units for g in groups) - gone
    most = sum(max(level.saved for level in levels) for levels in tables.values())
    if most < math.floor(wanted):
        raise ConfigError(f"Prune: {len(free)} groups cannot lose {wanted:.0f} units; the most they can is {most}.")
    return saving(wanted)


def keep_highest(groups: list[Group], scores: Mapping[str, Tensor], removed: Mapping[str, int], step: Prune) -> Keep:
    """The highest-scored units of each group, as many as `removed` leaves; equal counts for groups that must agree."""
    counts: dict[str, int] = {}
    for members in tied_sets(groups).values():
        kept = sum(g.units - removed.get(g.name, 0) for g in members) / len(members)
        units = members[0].units
        multiple = getattr(step.pattern_of(members[0].kind), "multiple_of", 1)
        counts.update(dict.fromkeys((g.name for g in members), _rounded(kept, units, multiple, members)))
    keep: Keep = {}
    for group in groups:
        if counts[group.name] < group.units:
            order = torch.argsort(scores[group.name], descending=True, stable=True)
            keep[group.name] = sorted(order[: counts[group.name]].tolist())
    return keep


def _is_count(members: list[Group], removed: int, step: Prune) -> bool:
    """Whether the pattern leaves the number of units as it is."""
    multiple, units = getattr(step.pattern_of(members[0].kind), "multiple_of", 1), members[0].units
    return _rounded(units - removed, units, multiple, members) == units - removed


def _rounded(kept: float, units: int, multiple: int, members: list[Group]) -> int:
    """The count nearest to `kept` that the pattern and every member can have."""
    step = math.lcm(multiple, *(g.multiple_of for g in members))
    if round(kept) >= units:
        return units
    return min(units, max(step, round(kept / step) * step))


def weights_per_unit(model: nn.Module, group: Group) -> int:
    """How many numbers of the model go with one unit of the group."""
    total = 0
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for member in group.members:
        if member.tensor in tensors:
            tensor = tensors[member.tensor]
            total += tensor.numel() // tensor.shape[member.axis] * member.positions.shape[1]
    return total
