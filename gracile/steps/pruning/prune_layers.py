"""Whole residual blocks taken out of a model, chosen by what that does to its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError, NothingChangedError
from gracile.graph import Block
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.sharing import share_parameters
from gracile.stats.collect import first_batch
from gracile.steps.latency.budget import record_latency
from gracile.steps.latency.timing import Timer, timer_for
from gracile.steps.pruning.block_order import BlockOrder, repair_blocks
from gracile.steps.pruning.blocks import removal_edits, select_blocks, skip_blocks
from gracile.steps.pruning.budget import cost_of, whole_cost
from gracile.surgery import Remove, apply

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def prune_layers(model: nn.Module, step: Prune, context: Context, recorder: Recorder) -> None:
    """Leave out blocks one after another, each time the one that costs least, repair the rest, and record it all."""
    batch = first_batch(context.data)
    blocks = select_blocks(model, batch, step, context, recorder)
    with timer_for(step.to, model, context, batch) as timer:
        order = choose_blocks(model, blocks, batch, step, context, recorder, timer)
        if not order.gone:
            raise NothingChangedError(
                f"Prune: none of {len(blocks)} residual blocks was removed; without the cheapest the outputs diverge "
                f"by {order.least:.3g}.\n  Raise the amount."
            )
        record_blocks(blocks, order.gone, order.losses, order.compared, recorder)
        recorder.numbers["divergence"] = order.losses[order.gone[-1]]
        reference = share_parameters(model)
        edits = removal_edits(model, order.gone, batch, context)
        skip_blocks(model, order.gone)
        repair_blocks(model, reference, order.gone, batch, step, context, recorder)
        apply(model, [edit for edit in edits if isinstance(edit, Remove)])
        if timer is not None:
            record_latency(model, timer, step.to, recorder)
    recorder.edits.extend(edits)


def choose_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    step: Prune,
    context: Context,
    recorder: Recorder,
    timer: Timer | None = None,
) -> BlockOrder:
    """An order of blocks whose first ones, those in `gone`, are to be left out.

    Where comparisons after repair led to other blocks than those without, both sets are repaired and compared in the
    end, unless a threshold decides how many go. timer: of the model, for a budget of latency.
    """
    order = BlockOrder(model, blocks, batch, step, context)
    _take(order, timer)
    if not order.strayed or step.below is not None:
        return order
    plain = BlockOrder(model, blocks, batch, step, context, repaired=False)
    _take(plain, timer)
    loss, loss_plain = order.loss_repaired(order.gone), order.loss_repaired(plain.gone)
    recorder.notes.append(
        f"All blocks chosen after repair leave a divergence of {loss:.3g} on held-out batches, all chosen without "
        f"{loss_plain:.3g}; the lesser was taken."
    )
    return plain if loss_plain < loss else order


def _take(order: BlockOrder, timer: Timer | None) -> None:
    """Take blocks until the step's amount is reached."""
    step, context, batch, count = order.step, order.context, order.batch, len(order.blocks)
    wanted = round(step.fraction * count) if step.fraction is not None else count
    reached = original = whole_cost(step.to, order.model, context, batch, timer) if step.to is not None else 0.0
    if step.to is not None and original <= step.to.limit(original):
        raise ConfigError(f"Prune(to={step.to}): the model is within this budget already ({original:g}).")
    while step.to is None or reached > step.to.limit(original):
        if step.to is not None and not order.left:
            raise ConfigError(
                f"Prune(to={step.to}): cannot be met; without all {count} residual blocks {reached:g} of "
                f"{original:g} remain ({reached / original:.3f}).\n  Ask for at least that."
            )
        if len(order.gone) == wanted or not order.left:
            return
        block, order.least = order.next()
        if step.below is not None and order.least >= step.below:
            return
        order.take(block)
        if step.to is not None:
            reached = cost_of(step.to, order.trial, context, batch, timer)


def record_blocks(
    blocks: Sequence[Block],
    gone: Sequence[Block],
    losses: Mapping[Block, float],
    compared: Sequence[Mapping[str, float]],
    recorder: Recorder,
) -> None:
    """A row for each block, and what was compared for each one gone (see `BlockOrder`)."""
    for block in blocks:
        action = "removed" if block in gone else "kept"
        recorder.layers.append(LayerRow(name=block.name, kind=block.kind, action=action, error=losses[block]))
    recorder.numbers["blocks_removed"] = len(gone)
    recorder.notes.append(
        "The rows give the divergence of the outputs from the original's when a block was removed beside those gone "
        "before, nothing being repaired; of a block kept, what removing it next would make it."
    )
    for number, found in enumerate(compared[: len(gone)], start=1):
        shown = ", ".join(f"{name} {loss:.3g}" for name, loss in found.items())
        recorder.notes.append(f"Block {number} by the divergence after repair on held-out batches: {shown}.")
