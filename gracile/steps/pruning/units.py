"""Scores of whole units by a criterion that looks at groups, with what it needs collected first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gracile.context import Context
from gracile.criteria import CannotScoreError, Consumer, Units
from gracile.data import Batch
from gracile.errors import ConfigError, DataError
from gracile.graph import Group, Trace
from gracile.layer_stats import ACTIVATION_STATS
from gracile.patterns import Member, mean_normalised
from gracile.recipe import Recorder
from gracile.stats.collect import collect_activations
from gracile.stats.gradients import collect_gates
from gracile.steps.pruning.consumers import input_columns, readers

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


@dataclass(frozen=True)
class ScoredGroups:
    """The groups of a model that may lose units, with what is known of them.

    model: uncut. traced: its trace on `batch`. scores: [units] of each group, higher is kept. consumers: what reads
    each group, with moments of its inputs; empty where the step does not look at it.
    """

    model: nn.Module
    traced: Trace
    batch: Batch
    groups: list[Group]
    scores: Mapping[str, Tensor]
    consumers: Mapping[str, Sequence[Consumer]] = field(default_factory=dict)


def score_groups(
    model: nn.Module,
    groups: Sequence[Group],
    consumers: Mapping[str, Sequence[Consumer]],
    step: Prune,
    context: Context,
    recorder: Recorder,
) -> dict[str, Tensor]:
    """[units] scores of each group by the step's criterion, higher is kept; a group that it cannot score is skipped.

    Groups that must keep as many units as a skipped one are skipped too. Raises ConfigError where none is left,
    DataError for scores that are not finite.
    """
    criterion = step.criterion
    normalise = (
        not criterion.comparable
        and step.below is None
        and any(getattr(pattern, "normalise", False) for pattern in step.patterns)
    )
    scores: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, units in collect_units(model, groups, consumers, criterion, step.examples, context).items():
        try:
            found = criterion.unit_scores(units)
        except CannotScoreError as error:
            reasons[name] = str(error)
            continue
        if not bool(torch.isfinite(found).all()):
            raise DataError(f"The scores of '{name}' hold NaN or infinity.\n  Check the weights and the data.")
        scores[name] = mean_normalised(found) if normalise else found
    for group in groups:
        tied = [g.name for g in groups if g.tied_count == group.tied_count and g.name in reasons]
        if group.name in scores and group.tied_count is not None and tied:
            del scores[group.name]
            reasons[group.name] = f"it keeps as many units as '{tied[0]}', which is not scored"
    for group in groups:
        if group.name in reasons:
            recorder.skip(group.name, group.kind, reasons[group.name])
    if not scores:
        name, reason = next(iter(reasons.items()))
        raise ConfigError(
            f"Prune: no group of units can be scored. {name}: {reason}.\n  Use another criterion, such as Magnitude()."
        )
    return scores


def exchange_units(
    keep: Mapping[str, list[int]], consumers: Mapping[str, Sequence[Consumer]], criterion: Any
) -> dict[str, list[int]]:
    """As many units of each group as before, chosen by a criterion that judges whole sets once their size is known."""
    if not hasattr(criterion, "choose"):
        return dict(keep)
    return {name: criterion.choose(Units(consumers=tuple(consumers[name])), kept) for name, kept in keep.items()}


def collect_units(
    model: nn.Module,
    groups: Sequence[Group],
    consumers: Mapping[str, Sequence[Consumer]],
    criterion: Any,
    examples: int,
    context: Context,
) -> dict[str, Units]:
    """What a criterion of whole units is given of each group, by name: weights, and the statistics that it names."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found = {
        group.name: Units(
            makers=tuple(_per_unit(tensors[m.tensor], m) for m in _made(group, tensors) if tensors[m.tensor].ndim > 1),
            norm_scales=tuple(_per_unit(tensors[m.tensor], m) for m in _made(group, tensors) if _is_scale(model, m)),
            consumers=tuple(consumers.get(group.name, ())),
        )
        for group in groups
    }
    for statistic in criterion.needs & ACTIVATION_STATS - {"gram"}:
        inputs = _collect_inputs(model, groups, statistic, context)
        found = {name: replace(units, inputs=inputs[name]) for name, units in found.items()}
    if "gate_gradient_sq" in criterion.needs:
        reading = {g.name: [m for m in g.members if m.role == "consumer" and m.tensor in tensors] for g in groups}
        gates = collect_gates(
            model,
            {name: members for name, members in reading.items() if members},
            context.data,
            examples=examples,
            on_example=lambda n: context.progress("gradients", n, examples),
        )
        found = {name: replace(units, gate_gradient_sq=gates.get(name)) for name, units in found.items()}
    return found


def _collect_inputs(
    model: nn.Module, groups: Sequence[Group], statistic: str, context: Context
) -> dict[str, tuple[Tensor, ...]]:
    """The statistic of the inputs that each unit feeds, [units, k] for each layer that reads the group."""
    reading = {group.name: readers(model, group) for group in groups}
    stats = collect_activations(
        model,
        sorted({layer for members in reading.values() for layer in members}),
        {statistic},
        context.data,
        on_batch=lambda n: context.progress("activations", n, None),
    )
    return {
        name: tuple(
            getattr(stats[layer], statistic)[input_columns(member.positions, model.get_submodule(layer).weight)]  # type: ignore[arg-type]
            for layer, member in members.items()
            if layer in stats
        )
        for name, members in reading.items()
    }


def _made(group: Group, tensors: Mapping[str, Tensor]) -> list[Member]:
    return [m for m in group.members if m.role == "producer" and m.tensor in tensors]


def _is_scale(model: nn.Module, member: Member) -> bool:
    """Whether the tensor is the γ of a batch norm."""
    layer, _, tensor = member.tensor.rpartition(".")
    return tensor == "weight" and isinstance(model.get_submodule(layer), _BatchNorm)


def _per_unit(tensor: Tensor, member: Member) -> Tensor:
    """[units, n]: what of the tensor belongs to each unit."""
    rows = tensor.detach().movedim(member.axis, 0)
    return rows[member.positions.to(rows.device)].flatten(1)
