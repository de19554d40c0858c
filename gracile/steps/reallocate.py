"""Widths shared out again around those found, where the losses of all groups together are known."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError
from gracile.graph import Group, Trace
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.stats.match import divergence
from gracile.steps.budget import Keep
from gracile.steps.latency_budget import LatencyBudget
from gracile.steps.sequence import Trial, choose_in_sequence
from gracile.steps.tables import measure_around, outputs_of, some_batches
from gracile.steps.widths import share_out

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def reallocate(
    keep: Keep,
    tables: Mapping[str, list[Level]],
    scores: Mapping[str, Tensor],
    model: nn.Module,
    traced: Trace,
    groups: list[Group],
    step: Prune,
    context: Context,
    batch: Batch,
    recorder: Recorder,
    latency: LatencyBudget | None = None,
) -> Keep:
    """The units that stay of the trial nearest to the model: of two starts, then of the allocation's rounds.

    keep: the widths that the tables of single cuts give; the other start leaves groups that several layers read (a
    residual stream) whole, where the amount can be met so. Each round then measures, around the best trial so far, what
    other widths of one group would do, and shares out anew; where the trial that this gives is no better, widths may
    move half as far. Ends early where they stay.
    """
    allocation, repair = step.allocation, step.repair
    assert isinstance(allocation, MeasuredLoss) and repair is not None
    batches = some_batches(context.data, allocation.examples)
    references = outputs_of(model, context.data, batches)

    def attempt(keep: Keep) -> tuple[float, Trial]:
        trial = choose_in_sequence(model, traced, groups, keep, step.criterion, repair, context)
        with eval_mode(trial.model):
            return divergence(outputs_of(trial.model, context.data, batches), references), trial

    losses = [attempt(keep)]
    least, best = losses[0]
    if allocation.rounds:
        inner = [g for g in groups if len(best.reads[g.name]) == 1]
        if 0 < len(inner) < len(groups):
            alone = {g.name: tables[g.name] for g in inner}
            with contextlib.suppress(ConfigError):  # the amount cannot be met by these groups alone
                keep = share_out(alone, allocation, model, traced, groups, scores, step, context, batch, None, latency)
                losses.append(attempt(keep))
            least, best = min(losses, key=lambda found: found[0])
    shrink, around, linear = 1.0, None, replace(allocation, power=1.0)
    for _ in range(allocation.rounds):
        free = [group for group in groups if group.name in best.scores]
        if around is None:
            with eval_mode(best.model):
                around = measure_around(best, traced, free, allocation, shrink, references, batches, context)
        near = {g.name: _within(around[g.name], best, g, allocation.reach * shrink) for g in free}
        fixed = {name: kept for name, kept in best.keep.items() if name not in best.scores}
        keep = share_out(near, linear, model, traced, groups, best.scores, step, context, batch, fixed, latency)
        if _widths(keep) == _widths(best.keep):
            break
        losses.append(attempt(keep))
        if losses[-1][0] < least:
            (least, best), around = losses[-1], None
        else:
            shrink /= 2
    recorder.numbers["allocation_loss"] = least
    shown = ", ".join(f"{loss:.3g}" for loss, _ in losses)
    recorder.notes.append(f"Divergence from the original by start and round of the allocation: {shown}.")
    return best.keep


def _within(levels: list[Level], trial: Trial, group: Group, reach: float) -> list[Level]:
    """The levels whose width differs from the trial's by at most this share of the units."""
    removed = group.units - len(trial.keep.get(group.name, range(group.units)))
    furthest = max(1, round(reach * group.units))
    return [level for level in levels if abs(level.removed - removed) <= furthest]


def _widths(keep: Keep) -> dict[str, int]:
    return {name: len(kept) for name, kept in keep.items()}
