"""Units chosen group after group, each on inputs that the cuts before it have changed already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.criteria import Consumer, Units
from gracile.graph import Group, Trace
from gracile.modes import eval_mode
from gracile.solvers import LeastSquares, Moments
from gracile.stats.match import split_batches
from gracile.stats.refit import Refit, refittable
from gracile.steps.consumers import input_columns, readers
from gracile.steps.correct import copy_model

Keep = dict[str, list[int]]


def choose_in_sequence(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    criterion: Any,
    solver: LeastSquares,
    context: Context,
) -> Keep:
    """As many units of each group as `keep` has, by scores taken when the layers before are cut and refitted.

    On a copy of the model, layer after layer in the order of its forward: the layers that read a group are refitted to
    what they computed in the original on the inputs that they get by now, the criterion scores the group by these
    weights and moments, and the reader is refitted on the units that stay. Columns are set to zero, not cut. A group
    with a reader that is called more than once keeps the units that `keep` has.
    """
    calls = {layer.name: layer.calls for layer in traced.layers}
    order = [n for n, count in calls.items() if count == 1 and refittable(model.get_submodule(n))]
    chosen: Keep = {name: list(kept) for name, kept in keep.items()}
    reads = {g.name: readers(model, g) for g in groups if g.name in keep}
    waiting = {name for name, found in reads.items() if found and set(found) <= set(order)}
    started = {layer for name in waiting for layer in reads[name]}
    if not started:
        return chosen
    trial = copy_model(model)
    repair = Refit(
        trial,
        model,
        split_batches(context.data)[0],
        context.data,
        solver,
        context.generator("refit"),
        norms=dict(traced.batch_norm_pairs()),
        summed=frozenset(name for name in order if traced.feeds_sum(name)),
    )
    units = {g.name: g.units for g in groups}
    layers = order[min(order.index(name) for name in started) :]
    with eval_mode(model, trial):
        for done, layer in enumerate(layers):
            moments = repair.measure(layer)
            read = [name for name in reads if layer in reads[name]]
            for name in read:
                if name in waiting:
                    waiting.remove(name)
                    consumers = [
                        _consumer(repair, reader, moments if reader == layer else repair.measure(reader), member)
                        for reader, member in reads[name].items()
                    ]
                    chosen[name] = _choose(criterion, Units(consumers=tuple(consumers)), len(keep[name]))
            weight: Any = trial.get_submodule(layer).weight
            left = torch.ones(weight[0].numel(), dtype=torch.bool)
            for name in read:
                gone = sorted(set(range(units[name])) - set(chosen[name]))
                left[input_columns(reads[name][layer].positions, weight)[gone].flatten()] = False
            repair.solve(layer, moments, None if bool(left.all()) else left.nonzero().squeeze(1))
            context.progress("choose units", done + 1, len(layers))
    return chosen


def _choose(criterion: Any, units: Units, count: int) -> list[int]:
    scores = criterion.unit_scores(units)
    kept: list[int] = sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
    return criterion.choose(units, kept) if hasattr(criterion, "choose") else kept


def _consumer(repair: Refit, layer: str, moments: Moments, member: Any) -> Consumer:
    """The layer as the criterion reads it, with the best weight for all of its present inputs."""
    repair.solve(layer, moments)
    weight: Tensor = repair.model.get_submodule(layer).weight.detach()  # type: ignore[operator,union-attr,assignment]
    gram = moments.gram
    if repair.centred(layer):
        gram = gram - torch.outer(moments.mean, moments.mean)
    # Twice, as H is: (2/N) Σ x xᵀ.
    return Consumer(layer, weight.flatten(1), 2 * gram, moments.mean, input_columns(member.positions, weight))
