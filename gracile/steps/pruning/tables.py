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
from gracile.graph import Group, Trace, cut_macs, tied_sets
from gracile.modes import eval_mode
from gracile.solvers import LeastSquares, Moments
from gracile.stats.match import divergence, split_batches
from gracile.stats.replay import Replay
from gracile.steps.pruning.sequence import Trial
from gracile.steps.pruning.units import ScoredGroups


def measure_tables(scored: ScoredGroups, allocation: MeasuredLoss, context: Context) -> dict[str, list[Level]]:
    """Group -> a Level for each width, lowest scores removed first; what is saved are multiply-accumulates.

    Groups that must keep one number of units lose as many each, and have one table, by the name that `tied_sets` gives.
    Nothing is cut: the columns that read the units are set to zero and the others refitted in closed form, on the
    inputs of the uncut model, which is what the cut would compute.
    """
    batches = some_batches(context.data, allocation.examples)
    traced, groups, consumers = scored.traced, scored.groups, scored.consumers
    trial = copy.deepcopy(scored.model).eval()
    references = outputs_of(trial, context.data, batches)
    replay = Replay(trial, context.data, batches)
    norms = dict(traced.batch_norm_pairs())
    full = cut_macs(traced, {})
    tables: dict[str, list[Level]] = {}
    reads = {group.name: [consumer.layer for consumer in consumers[group.name]] for group in groups}
    sets = _in_order(groups, reads, traced)
    for done, (name, members, first) in enumerate(sets):
        replay.seek(first)
        orders = {group.name: torch.argsort(scored.scores[group.name], stable=True) for group in members}
        layers = _by_layer(members, consumers)
        tables[name] = []
        for count in allocation.counts(members[0].units):
            undo = [_refit(trial, [(c, orders[n][:count]) for n, c in found], norms) for found in layers]
            loss = divergence(replay.outputs(), references)
            with torch.no_grad():
                for tensor, value in [pair for part in undo for pair in part]:
                    tensor.copy_(value)
            _check_finite(loss, count, members[0])
            saved = full - cut_macs(traced, {n: order[count:].sort().values.tolist() for n, order in orders.items()})
            tables[name].append(Level(count, loss, float(saved)))
        context.progress("loss tables", done + 1, len(sets))
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

    Only the layers that read a group are refitted to its other widths; references: outputs of the original. Groups of
    one number of units are moved together, as in `measure_tables`.
    """
    replay = Replay(trial.model, context.data, batches)
    tables: dict[str, list[Level]] = {}
    sets = _in_order(groups, trial.reads, traced)
    for done, (name, members, first) in enumerate(sets):
        replay.seek(first)
        units, tables[name] = members[0].units, []
        present = {g.name: trial.keep.get(g.name, list(range(units))) for g in members}
        best = {g.name: trial.scores[g.name].argsort(descending=True, stable=True).tolist() for g in members}
        layers = list(dict.fromkeys(layer for g in members for layer in trial.reads[g.name]))
        whole = cut_macs(traced, {**trial.keep, **{g.name: list(range(units)) for g in members}})
        for count in allocation.counts_around(units, units - len(present[name]), shrink):
            width = units - count
            moved = present if width == len(present[name]) else {n: sorted(order[:width]) for n, order in best.items()}
            keep = {**trial.keep, **moved}
            for layer in layers:
                trial.solve(layer, keep)
            loss = divergence(replay.outputs(), list(references))
            _check_finite(loss, count, members[0])
            tables[name].append(Level(count, loss, float(whole - cut_macs(traced, keep)), in_context=True))
        for layer in layers:
            trial.solve(layer, trial.keep)
        context.progress("loss tables", done + 1, len(sets))
    return tables


def _in_order(
    groups: Sequence[Group], reads: Mapping[str, Iterable[str]], traced: Trace
) -> list[tuple[str, list[Group], str]]:
    """Tied sets of groups with the first layer that reads each, in the order in which the forward calls these."""
    place = {layer.name: i for i, layer in enumerate(traced.layers)}
    sets = [
        (name, members, min((layer for g in members for layer in reads[g.name]), key=place.__getitem__))
        for name, members in tied_sets(groups).items()
    ]
    return sorted(sets, key=lambda found: place[found[2]])


def _by_layer(
    members: Sequence[Group], consumers: Mapping[str, Sequence[Consumer]]
) -> list[list[tuple[str, Consumer]]]:
    """For each layer that reads any of these groups, the groups that it reads and how."""
    found: dict[str, list[tuple[str, Consumer]]] = {}
    for group in members:
        for consumer in consumers[group.name]:
            found.setdefault(consumer.layer, []).append((group.name, consumer))
    return list(found.values())


def _check_finite(loss: float, count: int, group: Group) -> None:
    if not math.isfinite(loss):
        raise DataError(
            f"The outputs are NaN or infinite with {count} of {group.units} units of '{group.name}' removed.\n"
            f"  Exclude the layer, or use another allocation."
        )


@torch.no_grad()
def _refit(
    model: nn.Module, reads: Sequence[tuple[Consumer, Tensor]], norms: Mapping[str, str]
) -> list[tuple[Tensor, Tensor]]:
    """Set a layer to its least-squares weight without some columns; returns tensors with old values.

    reads: the layer as a reader of each group, and the units removed of that.
    """
    consumer = reads[0][0]
    layer: Any = model.get_submodule(consumer.layer)
    weight, gram, mean = (t.double().cpu() for t in (consumer.weight, consumer.gram, consumer.mean))
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    for each, gone in reads:
        stays[each.columns[gone].flatten()] = False
    left = stays.nonzero().squeeze(1)
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
