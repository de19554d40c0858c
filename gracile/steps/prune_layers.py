"""Whole residual blocks taken out of a model, chosen by what that does to its outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Batch, Data
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.graph import Block, find_blocks, trace
from gracile.nn import build_layer
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.select import Select
from gracile.stats.collect import first_batch
from gracile.stats.match import divergence
from gracile.steps.budget import cost_of
from gracile.steps.correct import copy_model
from gracile.steps.latency_budget import record_latency
from gracile.steps.repair import repair_units
from gracile.steps.tables import outputs_of, some_batches
from gracile.steps.timing import Timer, timer_for
from gracile.surgery import Edit, Remove, Resize, Swap, apply

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def prune_layers(model: nn.Module, step: Prune, context: Context, recorder: Recorder) -> None:
    """Leave out blocks one after another, each time the one that costs least, repair the rest, and record it all."""
    batch = first_batch(context.data)
    blocks = select_blocks(model, batch, step, context, recorder)
    with timer_for(step.to, model, context, batch) as timer:
        gone, losses = choose_blocks(model, blocks, batch, step, context, timer)
        if not gone:
            raise NothingChangedError(
                f"Prune: none of {len(blocks)} residual blocks was removed; without the cheapest the outputs diverge "
                f"by {min(losses.values()):.3g}.\n  Raise the amount."
            )
        for block in blocks:
            action = "removed" if block in gone else "kept"
            recorder.layers.append(LayerRow(name=block.name, kind=block.kind, action=action, error=losses[block]))
        recorder.numbers["blocks_removed"] = len(gone)
        recorder.numbers["divergence"] = losses[gone[-1]]
        reference = copy_model(model)
        edits = removal_edits(model, gone, batch, context)
        # All names stay at first, so that layers are compared with their originals.
        apply(model, [_skip(block) for block in gone])
        _repair(model, reference, gone, batch, step, context, recorder)
        apply(model, [edit for edit in edits if isinstance(edit, Remove)])
        if timer is not None:
            record_latency(model, timer, step, recorder)
    recorder.edits.extend(edits)
    recorder.notes.append(
        "The rows give the divergence of the outputs from the original's when a block was removed beside those gone "
        "before; of a block kept, what removing it next would make it."
    )


def select_blocks(model: nn.Module, batch: Batch, step: Prune, context: Context, recorder: Recorder) -> list[Block]:
    """Residual blocks that may be left out; what is not is recorded with its reason."""
    excluded = Select(exclude=step.exclude)
    excluded.check([name for name, _ in model.named_modules() if name])
    select = (context.select or Select()).without(*step.exclude)
    chosen = []
    for block in find_blocks(model, lambda net: context.data.forward(net, batch)):
        inside = [f"{block.name}.{name}" for name, _ in model.get_submodule(block.name).named_modules() if name]
        outside = [name for name in inside if not Select(exclude=select.exclude).matches(name)]
        if not (Select(include=select.include).matches(block.name)):
            continue
        reason = block.reason
        if not select.matches(block.name):
            reason = "excluded"
        elif outside:
            reason = f"it holds '{outside[0]}', which is excluded"
        reason = reason or _cannot_skip(model, block, batch, context)
        if reason is None:
            chosen.append(block)
        else:
            recorder.skip(block.name, block.kind, reason)
    if not chosen:
        reasons = "\n  ".join(f"{row.name}: {row.reason}" for row in recorder.layers[:5])
        raise ConfigError(
            "Prune: nothing that Layers() can remove.\n  "
            + (reasons or "No selected module adds to its input: the model has no residual blocks of one shape.")
        )
    return chosen


def choose_blocks(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, step: Prune, context: Context, timer: Timer | None = None
) -> tuple[list[Block], dict[Block, float]]:
    """Blocks to leave out, in the order chosen, and for every block the last divergence measured with it left out.

    timer: of the model, for a budget of latency.
    """
    trial = copy_model(model).eval()
    batches = some_batches(context.data, step.pattern.examples)
    references = outputs_of(trial, context.data, batches)
    original = math.nan
    if step.to is not None:
        original = cost_of(step.to, model, context, batch) if timer is None else timer.whole_ms
    if step.to is not None and original <= step.to.limit(original):
        raise ConfigError(f"Prune(to={step.to}): the model is within this budget already ({original:g}).")
    gone: list[Block] = []
    losses: dict[Block, float] = {}
    wanted = round(step.fraction * len(blocks)) if step.fraction is not None else len(blocks)
    reached = original
    while True:
        left = [block for block in blocks if block not in gone]
        for block in left:
            losses[block] = _loss_without(trial, block, context.data, batches, references)
            context.progress("blocks", len(blocks) - len(left) + 1, None, block.name)
        best = min(left, key=losses.__getitem__, default=None)
        if step.to is not None and reached <= step.to.limit(original):
            return gone, losses
        if best is None and step.to is not None:
            raise ConfigError(
                f"Prune(to={step.to}): cannot be met; without all {len(blocks)} residual blocks {reached:g} of "
                f"{original:g} remain ({reached / original:.3f}).\n  Ask for at least that."
            )
        if best is None or len(gone) == wanted or (step.below is not None and losses[best] >= step.below):
            return gone, losses
        gone.append(best)
        _put(trial, best.name, _skip_module(best, trial))
        if step.to is not None:
            reached = cost_of(step.to, trial, context, batch, timer)


def removal_edits(model: nn.Module, gone: Sequence[Block], batch: Batch, context: Context) -> list[Edit]:
    """Edits without these blocks: out of their list or sequence where the model then computes the same, else skipped.

    The last block comes first, so that the names of those before it still hold when it is gone.
    """
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(gone, key=lambda block: -place[block.name])
    trial = copy_model(model).eval()
    apply(trial, [_skip(block) for block in gone])
    expected = outputs_of(trial, context.data, [batch])
    edits: list[Edit] = []
    for block in ordered:
        candidate = copy.deepcopy(trial)
        try:
            apply(candidate, [Remove(block.name)])
            same = _same(outputs_of(candidate, context.data, [batch]), expected)
        except Exception:  # no list or sequence, or a forward that counts on its length
            same = False
        if same:
            trial = candidate
        edits.append(Remove(block.name) if same else _skip(block))
    return edits


def _cannot_skip(model: nn.Module, block: Block, batch: Batch, context: Context) -> str | None:
    """Why leaving the block out is not the same as replacing its first result by its input; None where it is."""

    def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return (x, *output[1:]) if isinstance(output, tuple) else x

    trial = copy_model(model).eval()
    handle = trial.get_submodule(block.name).register_forward_hook(replace, with_kwargs=True)
    expected = outputs_of(trial, context.data, [batch])
    handle.remove()
    _put(trial, block.name, _skip_module(block, trial))
    try:
        found = outputs_of(trial, context.data, [batch])
    except Exception as error:
        return f"the model does not run without it: {error}".splitlines()[0]
    return None if _same(found, expected) else "the model needs more of it than its first result"


def _repair(
    model: nn.Module,
    reference: nn.Module,
    gone: Sequence[Block],
    batch: Batch,
    step: Prune,
    context: Context,
    recorder: Recorder,
) -> None:
    order = [layer.name for layer in trace(reference, lambda net: context.data.forward(net, batch)).layers]
    traced = trace(model, lambda net: context.data.forward(net, batch))
    left = {layer.name for layer in traced.layers if layer.calls == 1}
    inside = [i for i, name in enumerate(order) if any(name.startswith(f"{block.name}.") for block in gone)]
    first = next((name for name in order[inside[0] :] if name in left), "")
    repair_units(model, reference, traced, Resize({}), step, context, recorder, first)


def _loss_without(
    trial: nn.Module, block: Block, data: Data, batches: Sequence[Batch], references: list[Tensor]
) -> float:
    module = trial.get_submodule(block.name)
    _put(trial, block.name, _skip_module(block, trial))
    loss = divergence(outputs_of(trial, data, batches), references)
    _put(trial, block.name, module)
    if not math.isfinite(loss):
        raise DataError(f"The outputs are NaN or infinite without '{block.name}'.\n  Exclude it.")
    return loss


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._modules[key] = module


def _skip(block: Block) -> Swap:
    return Swap(block.name, "Skip", {"outputs": block.outputs})


def _skip_module(block: Block, model: nn.Module) -> nn.Module:
    return build_layer("Skip", {"outputs": block.outputs}, model.get_submodule(block.name))


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected))
