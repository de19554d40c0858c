"""Units chosen group after group, each on inputs that the cuts before it have changed already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.criteria import Consumer, Units
from gracile.data import Batch
from gracile.graph import Group, Trace
from gracile.modes import eval_mode
from gracile.solvers import LeastSquares, Moments
from gracile.stats.match import split_batches
from gracile.stats.moments import CannotRefitError
from gracile.stats.refit import Refit, refittable
from gracile.stats.targets import Targets
from gracile.steps.correct import copy_model
from gracile.steps.pruning.budget import Keep
from gracile.steps.pruning.consumers import input_columns, readers, tied_layers


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
        self.repair.solve(layer, self.moments[layer], left.nonzero().squeeze(1))


def choose_in_sequence(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    criterion: Any,
    solver: LeastSquares,
    context: Context,
    targets: Targets | None = None,
) -> Trial:
    """As many units of each group as `keep` has, by scores taken when the layers before are cut and refitted.

    On a copy of the model, layer after layer in the order of its forward: the layers that read a group are refitted to
    what they computed in the original on the inputs that they get by now, the criterion scores the group by these
    weights and moments, and the reader is refitted on the units that stay. Columns are set to zero, not cut. A group
    with a reader that is called more than once, or reads other tokens than in the original, keeps the units that `keep`
    has. targets: what the layers gave in the original; None measures it.
    """
    order = layers_in_order(model, traced)
    reads = {g.name: _reading(model, g) for g in groups}
    targets = targets or targets_of(model, traced, order, context)
    repair = Refit(copy_model(model), targets, solver, norms=dict(traced.batch_norm_pairs()))
    trial = Trial(repair, {name: list(kept) for name, kept in keep.items()}, {}, reads, {})
    waiting = {name for name, read in reads.items() if read and set(read) <= set(order)}
    started = {layer for name in waiting for layer in reads[name]}
    layers = order[min(order.index(name) for name in started) :] if started else []
    with eval_mode(model, trial.model):
        for done, layer in enumerate(layers):
            try:
                trial.moments[layer] = repair.measure(layer)
                for name in sorted(n for n in waiting if layer in reads[n]):
                    _choose_group(trial, name, keep, criterion)
                    waiting.remove(name)
                trial.solve(layer, trial.keep)
            except CannotRefitError:
                waiting -= {name for name in waiting if layer in reads[name]}
            context.progress("choose units", done + 1, len(layers))
    repair.replay.clear()
    return trial


def _choose_group(trial: Trial, group: str, keep: Mapping[str, Sequence[int]], criterion: Any) -> None:
    """Score the group as the trial stands, and take as many of its units as `keep` has."""
    units = Units(consumers=_consumers(trial, group))
    trial.scores[group] = criterion.unit_scores(units)
    if group in keep:
        trial.keep[group] = _choose(criterion, units, trial.scores[group], len(keep[group]))


def called_once(model: nn.Module, traced: Trace) -> list[str]:
    """Layers of any kind that are called once each and share no parameter, in the order of the forward."""
    tied = tied_layers(model)
    return [layer.name for layer in traced.layers if layer.calls == 1 and layer.name not in tied]


def layers_in_order(model: nn.Module, traced: Trace) -> list[str]:
    """Those of `called_once` that can be refitted."""
    return [name for name in called_once(model, traced) if refittable(model.get_submodule(name))]


def targets_of(
    model: nn.Module,
    traced: Trace,
    layers: Sequence[str],
    context: Context,
    batches: Sequence[Batch] | None = None,
    absorbed: Mapping[str, Sequence[str]] | None = None,
) -> Targets:
    """What the layers give on these batches, and what is added to it, also behind a batch norm.

    batches: None takes all calibration batches to fit on. absorbed: see `Targets`.
    """
    norms = dict(traced.batch_norm_pairs())
    sums = {name: norms.get(name, name) for name in layers if traced.feeds_sum(name)}
    batches = split_batches(context.data)[0] if batches is None else batches
    return Targets(model, batches, context.data, layers, context.generator("refit"), sums, absorbed)


def _reading(model: nn.Module, group: Group) -> dict[str, Tensor]:
    found = {}
    for layer, member in readers(model, group).items():
        module: Any = model.get_submodule(layer)
        found[layer] = input_columns(member.positions, module.weight)
    return found


def _choose(criterion: Any, units: Units, scores: Tensor, count: int) -> list[int]:
    kept: list[int] = sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
    return criterion.choose(units, kept) if hasattr(criterion, "choose") else kept


def _consumers(trial: Trial, group: str) -> tuple[Consumer, ...]:
    """The layers that read the group as the criterion sees them, with the best weights for all their present inputs."""
    repair, found = trial.repair, []
    later = [layer for layer in trial.reads[group] if layer not in trial.moments]
    present = trial.moments | (repair.measure_inputs(later) if later else {})
    for layer, columns in trial.reads[group].items():
        moments = present[layer]
        repair.solve(layer, moments, torch.arange(len(moments.mean)))
        weight: Tensor = trial.model.get_submodule(layer).weight.detach()  # type: ignore[operator,union-attr,assignment]
        gram = moments.gram
        if repair.centred(layer):
            gram = gram - torch.outer(moments.mean, moments.mean)
        # Twice, as H is: (2/N) Σ x xᵀ.
        found.append(Consumer(layer, weight.flatten(1), 2 * gram, moments.mean, columns))
    return tuple(found)
