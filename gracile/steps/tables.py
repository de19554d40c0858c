"""Loss tables: what removing units of one group alone does to the model's outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.criteria import Consumer
from gracile.data import Batch, Data, batch_size, logits_of
from gracile.errors import DataError
from gracile.graph import Group, Trace, cut_macs
from gracile.modes import eval_mode
from gracile.solvers import LeastSquares, Moments
from gracile.stats.match import divergence, split_batches
from gracile.stats.replay import Replay
from gracile.steps.sequence import Trial


def measure_tables(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    consumers: Mapping[str, Sequence[Consumer]],
    allocation: MeasuredLoss,
    context: Context,
) -> dict[str, list[Level]]:
    """Group -> a Level for each width, lowest scores removed first; what is saved are multiply-accumulates.

    Nothing is cut: the columns that read the units are set to zero and the others refitted in closed form, on the
    inputs of the uncut model, which is what the cut would compute.
    """
    batches = some_batches(context.data, allocation.examples)
    trial = copy.deepcopy(model).eval()
    references = outputs_of(trial, context.data, batches)
    replay = Replay(trial, context.data, batches)
    norms = dict(traced.batch_norm_pairs())
    full = cut_macs(traced, {})
    tables: dict[str, list[Level]] = {}
    reads = {group.name: [consumer.layer for consumer in consumers[group.name]] for group in groups}
    for done, (group, first) in enumerate(_in_order(groups, reads, traced)):
        replay.seek(first)
        order = torch.argsort(scores[group.name], stable=True)
        tables[group.name] = []
        for count in allocation.counts(group.units):
            kept = order[count:].sort().values
            undo = [_refit(trial, consumer, kept, norms) for consumer in consumers[group.name]]
            loss = divergence(_outputs(replay), references)
            with torch.no_grad():
                for tensor, value in [pair for part in undo for pair in part]:
                    tensor.copy_(value)
            _check_finite(loss, count, group)
            saved = full - cut_macs(traced, {group.name: kept.tolist()})
            tables[group.name].append(Level(count, loss, float(saved)))
        context.progress("loss tables", done + 1, len(groups))
    return tables


def measure_around(
    trial: Trial,
    traced: Trace,
    groups: Sequence[Group],
    allocation: MeasuredLoss,
    shrink: float,
    references: Sequence[Tensor],
    batches: Sequence[Batch],
    context: Context,
) -> dict[str, list[Level]]:
    """Group -> a Level for each width near the present one, the other groups being as the trial has them.

    Only the layers that read a group are refitted to its other widths; references: outputs of the original.
    """
    replay = Replay(trial.model, context.data, batches)
    tables: dict[str, list[Level]] = {}
    for done, (group, first) in enumerate(_in_order(groups, trial.reads, traced)):
        replay.seek(first)
        kept = trial.keep.get(group.name, list(range(group.units)))
        best = trial.scores[group.name].argsort(descending=True, stable=True).tolist()
        whole = cut_macs(traced, {**trial.keep, group.name: list(range(group.units))})
        tables[group.name] = []
        for count in allocation.counts_around(group.units, group.units - len(kept), shrink):
            width = group.units - count
            keep = {**trial.keep, group.name: kept if width == len(kept) else sorted(best[:width])}
            for layer in trial.reads[group.name]:
                trial.solve(layer, keep)
            loss = divergence(_outputs(replay), list(references))
            _check_finite(loss, count, group)
            tables[group.name].append(Level(count, loss, float(whole - cut_macs(traced, keep)), in_context=True))
        for layer in trial.reads[group.name]:
            trial.solve(layer, trial.keep)
        context.progress("loss tables", done + 1, len(groups))
    return tables


def _in_order(groups: Sequence[Group], reads: Mapping[str, Iterable[str]], traced: Trace) -> list[tuple[Group, str]]:
    """Groups with the first layer that reads each, in the order in which the forward calls these."""
    place = {layer.name: i for i, layer in enumerate(traced.layers)}
    firsts = [(group, min(reads[group.name], key=place.__getitem__)) for group in groups]
    return sorted(firsts, key=lambda pair: place[pair[1]])


@torch.no_grad()
def _outputs(replay: Replay) -> list[Tensor]:
    return [logits_of(replay.run(i)) for i in range(len(replay.batches))]


def _check_finite(loss: float, count: int, group: Group) -> None:
    if not math.isfinite(loss):
        raise DataError(
            f"The outputs are NaN or infinite with {count} of {group.units} units of '{group.name}' removed.\n"
            f"  Exclude the layer, or use another allocation."
        )


@torch.no_grad()
def _refit(model: nn.Module, consumer: Consumer, kept: Tensor, norms: Mapping[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Set a reader to its least-squares weight on the columns of the units kept; returns tensors with old values."""
    layer: Any = model.get_submodule(consumer.layer)
    weight, gram, mean = (t.double().cpu() for t in (consumer.weight, consumer.gram, consumer.mean))
    read = torch.zeros(weight.shape[1], dtype=torch.bool)
    read[consumer.columns.flatten()] = True
    left = torch.cat([(~read).nonzero().squeeze(1), consumer.columns[kept].flatten()])
    moments = Moments(gram, weight @ gram, mean, weight @ mean).keep(left)
    solved, _ = LeastSquares()(weight[:, left], moments, centre=False)
    refitted = torch.zeros_like(weight)
    refitted[:, left] = solved
    changed = [(layer.weight, refitted.reshape(layer.weight.shape))]
    shift = (weight - refitted) @ mean  # of the output's mean, which the bias or the batch norm takes up
    if layer.bias is not None:
        changed.append((layer.bias, layer.bias.double().cpu() + shift))
    elif consumer.layer in norms:
        norm: Any = model.get_submodule(norms[consumer.layer])
        if norm.running_mean is not None:  # without, it takes out the mean of the batch by itself
            changed.append((norm.running_mean, norm.running_mean.double().cpu() - shift))
    undo = [(tensor, tensor.detach().clone()) for tensor, _ in changed]
    for tensor, value in changed:
        tensor.copy_(value)
    return undo


@torch.no_grad()
def outputs_of(model: nn.Module, data: Data, batches: Sequence[Batch]) -> list[Tensor]:
    """The main output of each batch, in eval mode."""
    with eval_mode(model):
        return [logits_of(data.forward(model, batch)) for batch in batches]


def some_batches(data: Data, examples: int) -> list[Batch]:
    """Calibration batches that hold at least so many examples; first those that nothing is fitted on."""
    fitted, held_out = split_batches(data)
    return at_least([*held_out, *fitted], examples)


def at_least(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """The first of the batches that hold so many examples, or all."""
    taken, count = [], 0
    for batch in batches:
        if count >= examples:
            break
        taken.append(batch)
        count += batch_size(batch)
    return taken
