"""Widths shared out again around those found, where the losses of all groups together are known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from gracile.allocate import MeasuredLoss
from gracile.context import Context
from gracile.data import Batch
from gracile.graph import Group, Trace
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.stats.match import divergence
from gracile.steps.sequence import Trial, choose_in_sequence
from gracile.steps.tables import measure_around, outputs_of, some_batches
from gracile.steps.widths import share_out

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def reallocate(
    trial: Trial,
    model: nn.Module,
    traced: Trace,
    groups: list[Group],
    step: Prune,
    context: Context,
    batch: Batch,
    recorder: Recorder,
) -> Trial:
    """The trial nearest to the model after the allocation's rounds, this one included.

    Each round measures, around the last trial, what other widths of one group would do, shares out anew, and chooses
    and refits in sequence again. Ends early where the widths stay.
    """
    allocation, repair = step.allocation, step.repair
    assert isinstance(allocation, MeasuredLoss) and repair is not None
    batches = some_batches(context.data, allocation.examples)
    free = [group for group in groups if group.name in trial.scores]
    with eval_mode(model, trial.model):
        references = outputs_of(model, context.data, batches)
        best, least = trial, divergence(outputs_of(trial.model, context.data, batches), references)
    losses = [least]
    for done in range(allocation.rounds):
        with eval_mode(trial.model):
            tables = measure_around(trial, traced, free, allocation, 0.5**done, references, batches, context)
        linear, scores = replace(allocation, power=1.0), trial.scores
        fixed = {name: kept for name, kept in trial.keep.items() if name not in scores}
        keep = share_out(tables, linear, model, traced, free, scores, step, context, batch, fixed)
        widths = {name: len(kept) for name, kept in trial.keep.items()}
        if {name: len(kept) for name, kept in keep.items()} == widths:
            break
        trial = choose_in_sequence(model, traced, groups, keep, step.criterion, repair, context)
        with eval_mode(trial.model):
            loss = divergence(outputs_of(trial.model, context.data, batches), references)
        losses.append(loss)
        if loss < least:
            best, least = trial, loss
    recorder.numbers["allocation_loss"] = least
    recorder.notes.append(
        "Divergence from the original by round of the allocation: " + ", ".join(f"{loss:.3g}" for loss in losses) + "."
    )
    return best
