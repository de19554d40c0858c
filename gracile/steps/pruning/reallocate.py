"""Widths shared out again around those found, where the losses of all groups together are known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.errors import ConfigError
from gracile.graph import Group, tied_sets
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.stats.match import divergence, split_batches
from gracile.steps.latency.budget import LatencyBudget
from gracile.steps.pruning.budget import Keep
from gracile.steps.pruning.consumers import readers
from gracile.steps.pruning.sequence import Trial, choose_in_sequence, layers_in_order, targets_of
from gracile.steps.pruning.tables import at_least, measure_around, outputs_of
from gracile.steps.pruning.units import ScoredGroups
from gracile.steps.pruning.widths import share_out

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


#: Calibration examples that a trial is fitted on: enough to compare widths by.
TRIAL_EXAMPLES = 1024


def reallocate(
    keep: Keep,
    tables: Mapping[str, list[Level]],
    scored: ScoredGroups,
    step: Prune,
    context: Context,
    recorder: Recorder,
    latency: LatencyBudget | None = None,
) -> Keep:
    """The units that stay of the trial nearest to the model: of several starts, then of the allocation's rounds.

    keep: the widths that the tables of single cuts give. Each round measures, around the best trial so far, what other
    widths of one group would do, and shares out anew; where the trial that this gives is no better, widths may move
    half as far; where the widths shared out were tried before, one group is moved from its own (`_untried`). Ends early
    where nothing is left to try. Trials are fitted on TRIAL_EXAMPLES examples, and the units that make up
    the widths found are chosen on all.
    """
    allocation, repair = step.allocation, step.repair
    assert isinstance(allocation, MeasuredLoss) and repair is not None
    model, traced, groups = scored.model, scored.traced, scored.groups
    fitted, held_out = split_batches(context.data)
    batches = at_least([*held_out, *fitted], allocation.examples)
    judged = max(batches, held_out, key=len)  # the shorter of the two is where the longer begins
    answers = outputs_of(model, context.data, judged)
    references = answers[: len(batches)]
    some = at_least(fitted, TRIAL_EXAMPLES)
    targets = targets_of(model, traced, layers_in_order(model, traced), context, some)

    def attempt(keep: Keep) -> tuple[float, Trial]:
        trial = choose_in_sequence(model, traced, groups, keep, step.criterion, repair, context, targets)
        return divergence(outputs_of(trial.model, context.data, judged), answers), trial

    least, best = attempt(keep)
    losses, tried = [least], [_widths(best.keep)]
    if allocation.rounds:
        for keep in _starts(tables, scored, step, context, latency):
            if _widths(keep) not in tried:
                tried.append(_widths(keep))
                loss, trial = attempt(keep)
                losses.append(loss)
                least, best = min((least, best), (loss, trial), key=lambda found: found[0])
    shrink, around, linear = 1.0, None, replace(allocation, power=1.0)
    for _ in range(allocation.rounds):
        sets = {n: members for n, members in tied_sets(groups).items() if all(g.name in best.scores for g in members)}
        free = [group for members in sets.values() for group in members]
        if around is None:
            with eval_mode(best.model):
                around = measure_around(best, traced, free, allocation, shrink, references, batches, context)
        near = {name: _within(around[name], best, sets[name][0], allocation.reach * shrink) for name in sets}
        fixed = {name: kept for name, kept in best.keep.items() if name not in {g.name for g in free}}
        share = partial(
            share_out,
            allocation=linear,
            scored=replace(scored, scores=best.scores),
            step=step,
            context=context,
            fixed=fixed,
            latency=latency,
        )
        found = _untried(near, best, sets, share, tried)
        if found is None:
            break
        tried.append(_widths(found))
        loss, trial = attempt(found)
        losses.append(loss)
        if loss < least:
            least, best, around = loss, trial, None
        else:
            shrink /= 2
    recorder.numbers["allocation_loss"] = least
    shown = ", ".join(f"{loss:.3g}" for loss in losses)
    recorder.notes.append(f"Divergence from the original by start and round of the allocation: {shown}.")
    if len(some) == len(fitted):
        return best.keep
    return choose_in_sequence(model, traced, groups, best.keep, step.criterion, repair, context).keep


def _starts(
    tables: Mapping[str, list[Level]],
    scored: ScoredGroups,
    step: Prune,
    context: Context,
    latency: LatencyBudget | None,
) -> Iterator[Keep]:
    """Widths by each power, of all groups and of those that one layer alone reads: residual streams stay whole."""
    assert isinstance(step.allocation, MeasuredLoss)
    sets = tied_sets(scored.groups)
    inner = {name: tables[name] for name in sets if all(len(readers(scored.model, g)) == 1 for g in sets[name])}
    for power in (step.allocation.power, *step.allocation.starts):
        for some in (tables, inner):
            with contextlib.suppress(ConfigError):  # the amount cannot be met by these groups alone
                allocation = replace(step.allocation, power=power)
                yield share_out(some, allocation, scored, step, context, None, latency)


def _untried(
    near: Mapping[str, list[Level]],
    best: Trial,
    sets: Mapping[str, list[Group]],
    share: Callable[[Mapping[str, list[Level]]], Keep],
    tried: Sequence[Mapping[str, int]],
) -> Keep | None:
    """The widths that promise least by these tables; where they were tried, the best with one group moved from its own.

    share: widths that meet the amount by tables; raises ConfigError where there are none. None where nothing is left to
    try.
    """
    with contextlib.suppress(ConfigError):
        keep = share(near)
        if _widths(keep) not in tried:
            return keep
    found = []
    for name, members in sets.items():
        removed = _removed(best.keep, members[0])
        others = [level for level in near[name] if level.removed != removed]
        with contextlib.suppress(ConfigError):
            moved = share({**near, name: others}) if others else best.keep
            if _widths(moved) not in tried:
                found.append((sum(_loss_at(near[n], _removed(moved, sets[n][0])) for n in sets), moved))
    return min(found, key=lambda each: each[0])[1] if found else None


def _loss_at(levels: Sequence[Level], removed: int) -> float:
    """Between two widths of the table, losses are taken to be linear."""
    ordered = sorted(levels, key=lambda level: level.removed)
    return float(np.interp(removed, [level.removed for level in ordered], [level.loss for level in ordered]))


def _removed(keep: Keep, group: Group) -> int:
    return group.units - len(keep.get(group.name, range(group.units)))


def _within(levels: list[Level], trial: Trial, group: Group, reach: float) -> list[Level]:
    """The levels whose width differs from the trial's by at most this share of the units."""
    removed = _removed(trial.keep, group)
    furthest = max(1, round(reach * group.units))
    return [level for level in levels if abs(level.removed - removed) <= furthest]


def _widths(keep: Keep) -> dict[str, int]:
    return {name: len(kept) for name, kept in keep.items()}
