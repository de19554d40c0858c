"""Blocks and units to one budget: how many blocks go is tried, and the units make up the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError, NothingChangedError
from gracile.goal import Budget, Latency
from gracile.graph import Block
from gracile.patterns import Layers
from gracile.recipe import Recorder
from gracile.sharing import own_parameters, share_parameters
from gracile.stats.collect import first_batch
from gracile.stats.match import divergence
from gracile.steps.block_order import BlockOrder, repair_blocks
from gracile.steps.blocks import removal_edits, select_blocks, skip_blocks
from gracile.steps.budget import cost_of, whole_cost
from gracile.steps.latency_budget import record_latency
from gracile.steps.prune_layers import record_blocks
from gracile.steps.prune_units import prune_units
from gracile.steps.repair import Reference
from gracile.steps.tables import outputs_of
from gracile.steps.timing import Timer, timer_for
from gracile.surgery import Remove, apply

if TYPE_CHECKING:
    from gracile.steps.prune import Prune

#: So many numbers of blocks in a row that are no better than the best end the trials.
PATIENCE = 2


@dataclass
class Attempt:
    """A model within the budget: which blocks it lost, what it recorded, and its divergence on held-out batches.

    losses: of all blocks, as they were when these were gone (`BlockOrder`).
    """

    gone: list[Block]
    losses: dict[Block, float]
    model: nn.Module
    recorder: Recorder
    loss: float


def prune_jointly(model: nn.Module, step: Prune, context: Context, recorder: Recorder) -> None:
    """Remove blocks and units so that the step's budget is met and the outputs diverge least from the original's.

    For 0, 1, 2, … blocks removed, in the order of `BlockOrder`, a copy without them is repaired and its units are cut
    to what the budget leaves, with the step's criterion, allocation and repair, towards the model as it was. The copy
    with the least divergence on held-out calibration batches is what the model becomes. Ends once two more blocks have
    not made it less, or the blocks alone meet the budget: a cut of units for each number tried, at most three more than
    the blocks removed in the end. A budget of latency is one of the model as it was, and every copy is timed beside
    that; tables of latency are measured once, in the model as it was, and what a copy saves is derived from them.
    """
    batch = first_batch(context.data)
    with timer_for(step.to, model, context, batch) as timer:
        _prune(model, step, context, recorder, batch, timer)
        if timer is not None:
            record_latency(model, timer, step, recorder)


def _prune(
    model: nn.Module, step: Prune, context: Context, recorder: Recorder, batch: Batch, timer: Timer | None
) -> None:
    assert step.to is not None
    original = whole_cost(step.to, model, context, batch, timer)
    limit = step.to.limit(original)
    if original <= limit:
        raise ConfigError(f"Prune(to={step.to}): the model is within this budget already ({original:g}).")
    units = replace(
        step,
        to=_absolute(step.to, limit),
        pattern=tuple(pattern for pattern in step.patterns if not isinstance(pattern, Layers)),
    )
    try:
        blocks = select_blocks(model, batch, step, context, recorder)
    except ConfigError as error:  # none can go, and the units still can
        blocks = []
        recorder.notes.append(f"No block was removed. {str(error).partition('  ')[2] or error}")
    best = _least(BlockOrder(model, blocks, batch, step, context), units, recorder, timer)
    recorder.layers.extend(best.recorder.layers)
    recorder.notes.extend(best.recorder.notes)
    recorder.numbers.update(best.recorder.numbers)
    recorder.numbers["divergence"] = best.loss
    reference = share_parameters(model)
    removals = removal_edits(model, best.gone, batch, context)
    skip_blocks(model, best.gone)
    apply(model, best.recorder.edits)
    own_parameters(model, reference)
    model.load_state_dict(best.model.state_dict())
    apply(model, [edit for edit in removals if isinstance(edit, Remove)])
    recorder.edits.extend([*best.recorder.edits, *removals])


def _least(order: BlockOrder, units: Prune, recorder: Recorder, timer: Timer | None) -> Attempt:
    """The attempt with the least divergence of those made; raises ConfigError with the reasons where none succeeded.

    units: the step without its `Layers`, its budget a number.
    """
    best: Attempt | None = None
    shown: list[str] = []
    since = 0
    while True:
        within = False
        try:
            attempt, within = _attempt(order, units, timer)
        except (ConfigError, NothingChangedError) as error:  # these units cannot meet what is left of the budget
            shown.append(f"{len(order.gone)}: {str(error).partition(chr(10))[0].rstrip('.')}")
        else:
            shown.append(f"{len(order.gone)}: {attempt.loss:.3g}")
            since = 0 if best is None or attempt.loss < best.loss else since + 1
            best = attempt if since == 0 else best
        if within or not order.left or since == PATIENCE:
            break
        order.take(order.next()[0])
    if best is None:
        raise ConfigError(
            f"Prune(to={order.step.to}): cannot be met by blocks and units; by the number of blocks removed:\n  "
            + "\n  ".join(shown)
        )
    record_blocks(order.blocks, best.gone, best.losses, order.compared, recorder)
    recorder.notes.append(f"Divergence on held-out batches by the number of blocks removed: {', '.join(shown)}.")
    return best


def _attempt(order: BlockOrder, units: Prune, timer: Timer | None) -> tuple[Attempt, bool]:
    """A copy without the blocks gone so far, cut to the budget; and whether it was within without a cut of units."""
    assert units.to is not None
    model, batch, context = order.model, order.batch, order.context
    gone = list(order.gone)
    trial, recorder = share_parameters(model), Recorder(units)
    reference, within = Reference(model), False
    if gone:
        skip_blocks(trial, gone)
        reached = cost_of(units.to, trial, context, batch, timer)
        within = reached <= units.to.limit(reached)
        timer = timer.starting_from(reached / timer.whole_ms) if timer is not None else None
        repaired = recorder if within else Recorder(units)
        reference = repair_blocks(trial, model, gone, batch, units, context, repaired)
    if not within:
        prune_units(trial, units, context, recorder, reference=reference, timer=timer)
    loss = divergence(outputs_of(trial, context.data, order.held_out), order.expected)
    return Attempt(gone, dict(order.losses), trial, recorder, loss if math.isfinite(loss) else math.inf), within


def _absolute(budget: Budget, limit: float) -> Budget:
    """The same budget as a number of its unit: a share would be one of what is left without some blocks."""
    absolute = replace(budget, amount=limit, way=1.0)
    return replace(absolute, ms=True) if isinstance(absolute, Latency) else absolute
