"""Blocks and units to one budget: how many blocks go is tried, and the units make up the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from gracile.allocate import MeasuredLoss
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
from gracile.steps.latency.budget import record_latency
from gracile.steps.latency.timing import Timer, timer_for
from gracile.steps.pruning.block_order import BlockOrder, repair_blocks
from gracile.steps.pruning.blocks import removal_edits, select_blocks, skip_blocks
from gracile.steps.pruning.budget import cost_of, whole_cost
from gracile.steps.pruning.prune_layers import record_blocks
from gracile.steps.pruning.prune_units import prune_units
from gracile.steps.pruning.repair import Reference
from gracile.steps.pruning.tables import outputs_of
from gracile.surgery import Remove, apply

if TYPE_CHECKING:
    from gracile.steps.prune import Prune

#: So many numbers of blocks are tried first, evenly spaced; those between, around the best of them.
COARSE = 6
#: So many of the first in a row that are no better than the best end them.
PATIENCE = 2


@dataclass
class Attempt:
    """A model within the budget: which blocks it lost, what it recorded, and its divergence on held-out batches.

    losses: of all blocks, as they were when these were gone (`BlockOrder`). within: without a cut of units.
    """

    gone: list[Block]
    losses: dict[Block, float]
    model: nn.Module
    recorder: Recorder
    loss: float
    within: bool


def prune_jointly(model: nn.Module, step: Prune, context: Context, recorder: Recorder) -> None:
    """Remove blocks and units so that the step's budget is met and the outputs diverge least from the original's.

    For some numbers of blocks removed, in the order of `BlockOrder`, a copy without them is repaired and its units are
    cut to what the budget leaves, with the step's criterion, allocation and repair, towards the model as it was. The
    copy with the least divergence on held-out calibration batches is what the model becomes. Numbers evenly spaced are
    tried from 0 until two have not made it less or the blocks alone meet the budget, then those around the best; rounds
    of the allocation are made for the best alone. A budget of latency is one of the model as it was, and every copy is
    timed beside that; tables of latency are measured once, in the model as it was, and what a copy saves is derived.
    """
    batch = first_batch(context.data)
    with timer_for(step.to, model, context, batch) as timer:
        _prune(model, step, context, recorder, batch, timer)
        if timer is not None:
            record_latency(model, timer, step.to, recorder)


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
    trials = Trials(order, _without_rounds(units), timer)
    stride = max(1, round(len(order.blocks) / COARSE))
    since = count = 0
    while trials.make(count) and since < PATIENCE:
        since = 0 if trials.best is None or trials.best_count == count else since + 1
        count += stride
    while stride > 1 and trials.best is not None:
        stride //= 2
        middle = trials.best_count
        for count in (middle - stride, middle + stride):
            trials.make(count)
    best = trials.best
    shown = ", ".join(f"{count}: {said}" for count, said in sorted(trials.said.items()))
    if best is None:
        raise ConfigError(
            f"Prune(to={order.step.to}): cannot be met by blocks and units; by the number of blocks removed:\n  "
            + shown.replace(", ", "\n  ")
        )
    if trials.units != units and not best.within:
        again = attempt_without(order, best.gone, best.losses, units, timer)
        shown += f"; with the allocation's rounds {again.loss:.3g}"
        best = min(best, again, key=lambda attempt: attempt.loss)
    record_blocks(order.blocks, best.gone, best.losses, order.compared, recorder)
    recorder.notes.append(f"Divergence on held-out batches by the number of blocks removed: {shown}.")
    return best


class Trials:
    """Attempts by the number of blocks removed, each made once.

    best: the one with the least divergence so far, of `best_count` blocks. said: of every one tried its divergence, or
    why there is none.
    """

    def __init__(self, order: BlockOrder, units: Prune, timer: Timer | None) -> None:
        self.order, self.units, self.timer = order, units, timer
        self.best: Attempt | None = None
        self.best_count = 0
        self.said: dict[int, str] = {}
        self._losses = [dict(order.losses)]
        self._enough = math.inf

    def make(self, count: int) -> bool:
        """Try without so many blocks; False where there are not as many, or fewer alone are within the budget."""
        order = self.order
        if not 0 <= count <= min(len(order.blocks), self._enough):
            return False
        while len(order.gone) < count:
            order.take(order.next()[0])
            self._losses.append(dict(order.losses))
        if count in self.said:
            return True
        try:
            attempt = attempt_without(order, order.gone[:count], self._losses[count], self.units, self.timer)
        except (ConfigError, NothingChangedError) as error:  # these units cannot meet what is left of the budget
            self.said[count] = str(error).partition(chr(10))[0].rstrip(".")
            return True
        self.said[count] = f"{attempt.loss:.3g}"
        if attempt.within:
            self._enough = count
        if self.best is None or attempt.loss < self.best.loss:
            self.best, self.best_count = attempt, count
        return True


def attempt_without(
    order: BlockOrder, gone: list[Block], losses: dict[Block, float], units: Prune, timer: Timer | None
) -> Attempt:
    """A copy without these blocks, repaired and cut to the budget, unless it is within without a cut of units."""
    assert units.to is not None
    model, batch, context = order.model, order.batch, order.context
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
    return Attempt(gone, losses, trial, recorder, loss if math.isfinite(loss) else math.inf, within)


def _without_rounds(units: Prune) -> Prune:
    """The step with its allocation's first answer."""
    if not isinstance(units.allocation, MeasuredLoss) or not units.allocation.rounds:
        return units
    return replace(units, allocation=replace(units.allocation, rounds=0))


def _absolute(budget: Budget, limit: float) -> Budget:
    """The same budget as a number of its unit: a share would be one of what is left without some blocks."""
    absolute = replace(budget, amount=limit, way=1.0)
    return replace(absolute, ms=True) if isinstance(absolute, Latency) else absolute
