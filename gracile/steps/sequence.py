"""Units chosen group after group, each on inputs that the cuts before it have changed already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from gracile.steps.budget import Keep
from gracile.steps.consumers import input_columns, readers, tied_layers
from gracile.steps.correct import copy_model


@dataclass
class Trial:
    """A copy of the model whose groups are cut by zeros and whose layers are refitted, and what other widths need.

    keep: units that stay, by group. scores: of all units of a group, taken when its turn came. reads: layers that read
    a group, with the columns of each unit, [units, k]. moments: of the inputs of these layers in the trial.
    """

    repair: Refit
    keep: Keep
    scores: dict[str, Tensor]
    reads: dict[str, dict[str, Tensor]]
    moments: dict[str, Moments]

    @property
    def model(self) -> nn.Module:
        return self.repair.model

    def solve(self, layer: str, keep: Mapping[str, Sequence[int]]) -> None:
        """Refit the layer on the units that stay of all that it reads."""
        weight: Any = self.model.get_submodule(layer).weight
        left = torch.ones(weight[0].numel(), dtype=torch.bool)
        for name, read in self.reads.items():
            if layer in read and name in keep:
                columns = read[layer]
                gone = torch.ones(len(columns), dtype=torch.bool)
                gone[list(keep[name])] = False
                left[columns[gone].flatten()] = False
        self.repair.solve(layer, self.moments[layer], None if bool(left.all()) else left.nonzero().squeeze(1))


def choose_in_sequence(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    criterion: Any,
    solver: LeastSquares,
    context: Context,
) -> Trial:
    """As many units of each group as `keep` has, by scores taken when the layers before are cut and refitted.

    On a copy of the model, layer after layer in the order of its forward: the layers that read a group are refitted to
    what they computed in the original on the inputs that they get by now, the criterion scores the group by these
    weights and moments, and the reader is refitted on the units that stay. Columns are set to zero, not cut. A group
    with a reader that is called more than once keeps the units that `keep` has.
    """
    calls = {layer.name: layer.calls for layer in traced.layers}
    tied = tied_layers(model)
    order = [n for n, count in calls.items() if count == 1 and n not in tied and refittable(model.get_submodule(n))]
    reads = {g.name: _reading(model, g) for g in groups}
    repair = Refit(
        copy_model(model),
        model,
        split_batches(context.data)[0],
        context.data,
        solver,
        context.generator("refit"),
        norms=dict(traced.batch_norm_pairs()),
        summed=frozenset(name for name in order if traced.feeds_sum(name)),
    )
    trial = Trial(repair, {name: list(kept) for name, kept in keep.items()}, {}, reads, {})
    waiting = {name for name, read in reads.items() if read and set(read) <= set(order)}
    started = {layer for name in waiting for layer in reads[name]}
    layers = order[min(order.index(name) for name in started) :] if started else []
    with eval_mode(model, trial.model):
        for done, layer in enumerate(layers):
            trial.moments[layer] = repair.measure(layer)
            for name in sorted(waiting):
                if layer in reads[name]:
                    waiting.remove(name)
                    units = Units(consumers=tuple(_consumer(trial, reader, name) for reader in reads[name]))
                    trial.scores[name] = criterion.unit_scores(units)
                    if name in keep:
                        trial.keep[name] = _choose(criterion, units, trial.scores[name], len(keep[name]))
            trial.solve(layer, trial.keep)
            context.progress("choose units", done + 1, len(layers))
    return trial


def _reading(model: nn.Module, group: Group) -> dict[str, Tensor]:
    found = {}
    for layer, member in readers(model, group).items():
        module: Any = model.get_submodule(layer)
        found[layer] = input_columns(member.positions, module.weight)
    return found


def _choose(criterion: Any, units: Units, scores: Tensor, count: int) -> list[int]:
    kept: list[int] = sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
    return criterion.choose(units, kept) if hasattr(criterion, "choose") else kept


def _consumer(trial: Trial, layer: str, group: str) -> Consumer:
    """The layer as the criterion reads it, with the best weight for all of its present inputs."""
    repair = trial.repair
    moments = trial.moments.get(layer) or repair.measure(layer)
    repair.solve(layer, moments)
    weight: Tensor = trial.model.get_submodule(layer).weight.detach()  # type: ignore[operator,union-attr,assignment]
    gram = moments.gram
    if repair.centred(layer):
        gram = gram - torch.outer(moments.mean, moments.mean)
    # Twice, as H is: (2/N) Σ x xᵀ.
    return Consumer(layer, weight.flatten(1), 2 * gram, moments.mean, trial.reads[group][layer])
