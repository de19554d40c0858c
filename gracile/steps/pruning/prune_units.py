"""Whole units (channels, neurons, heads, hidden units) cut out of every tensor that carries them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gracile.allocate import GlobalRank, MeasuredLoss
from gracile.context import Context
from gracile.criteria import Consumer, Magnitude
from gracile.errors import ConfigError, NothingChangedError
from gracile.graph import Group, Trace, trace
from gracile.nn import QuantizedLayer
from gracile.patterns import reduce_scores, unit_norms
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.select import Select
from gracile.sharing import share_parameters
from gracile.stats.collect import first_batch
from gracile.steps.latency.budget import LatencyBudget, prepare_latency, record_latency, with_vector_widths
from gracile.steps.latency.timing import Timer, timer_for
from gracile.steps.pruning.budget import meet_budget
from gracile.steps.pruning.consumers import collect_consumers, readers
from gracile.steps.pruning.cut import Keep, cut_checked
from gracile.steps.pruning.reallocate import reallocate
from gracile.steps.pruning.repair import Reference, repair_units
from gracile.steps.pruning.scores import score_weights
from gracile.steps.pruning.sequence import choose_in_sequence
from gracile.steps.pruning.tables import measure_tables
from gracile.steps.pruning.units import ScoredGroups, exchange_units, score_groups
from gracile.steps.pruning.widths import keep_highest, share_out, weights_per_unit

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


#: Batches on which a cut is proven: a forward may branch on its data, so that one shows too little.
CHECKED_BATCHES = 3


def prune_units(
    model: nn.Module,
    step: Prune,
    context: Context,
    recorder: Recorder,
    *,
    reference: Reference | None = None,
    timer: Timer | None = None,
) -> None:
    """Cut the lowest-scored units of the selected groups, check the result, and correct statistics.

    reference: what the cut model is repaired towards; None: the model before the cut. timer: for a budget of latency,
        in place of one of this model; the latency in the end is then the caller's to record.
    """
    batch = first_batch(context.data)

    def run(net: nn.Module) -> Any:
        return context.data.forward(net, batch)

    traced = trace(model, run)
    groups = select_groups(model, traced, step, context, recorder)
    consumers: dict[str, list[Consumer]] = {}
    if reads_inputs(step):
        consumers = collect_consumers(model, traced, groups, context)
    scores = score_units(model, groups, consumers, step, context, recorder)
    groups = [group for group in groups if group.name in scores]
    scored = ScoredGroups(model, traced, batch, groups, scores, consumers)
    with nullcontext(timer) if timer is not None else timer_for(step.to, model, context, batch) as timing:
        keep = choose_units(scored, step, context, recorder, timing)
        if not keep:
            raise NothingChangedError(
                f"Prune: no unit was removed from {len(groups)} groups; each keeps at least one, none scored low "
                f"enough.\n  Raise the amount; `gracile inspect` shows the groups and their sizes."
            )
        reference = reference or Reference(share_parameters(model))  # a cut makes new tensors
        checked = list(itertools.islice(context.data.calibration_batches, CHECKED_BATCHES))
        keep, edit = cut_checked(
            model, traced, keep, lambda net: [context.data.forward(net, each) for each in checked], recorder
        )
        if timer is None and timing is not None:
            record_latency(model, timing, step.to, recorder)
    recorder.edits.append(edit)
    for group in groups:
        kept = len(keep.get(group.name, range(group.units)))
        if kept < group.units:
            recorder.layers.append(
                LayerRow(name=group.name, kind=group.kind, action="cut", kept=kept, of=group.units, reason=group.exact)
            )
    recorder.numbers["units_removed"] = sum(traced.group(name).units - len(kept) for name, kept in keep.items())
    repair_units(model, reference, traced, edit, step, context, recorder)


def reads_inputs(step: Prune) -> bool:
    """Whether the step looks at the layers that read a group, by its criterion or its allocation."""
    return scores_by_inputs(step.criterion) or isinstance(step.allocation, MeasuredLoss)


def scores_by_inputs(criterion: Any) -> bool:
    """Whether the criterion scores a unit by the layers that read it."""
    return hasattr(criterion, "unit_scores") and "gram" in criterion.needs


def select_groups(model: nn.Module, traced: Trace, step: Prune, context: Context, recorder: Recorder) -> list[Group]:
    """Groups of the pattern's kinds that may be cut; what is left out is recorded with its reason.

    A group is selected by the layers whose weight matrices make its units. Norms behind them go along, unless excluded.
    """
    select = (context.select or Select()).without(*step.exclude)
    excluded = Select(exclude=select.exclude)
    Select(exclude=step.exclude).check([layer.name for layer in traced.layers])
    chosen = []
    for group in traced.groups:
        if group.kind not in step.kinds:
            continue
        producers = _layers(group, "producer") or [group.name]
        makers = _makers(model, group, traced) or producers
        if not any(select.matches(layer) for layer in makers):
            continue
        outside = [layer for layer in makers if not select.matches(layer)]
        outside += [layer for layer in producers if not excluded.matches(layer)]
        if group.frozen is not None:
            recorder.skip(group.name, group.kind, group.frozen)
        elif outside:
            recorder.skip(group.name, group.kind, f"tied to '{outside[0]}', which is not selected")
        elif group.units < 2:
            recorder.skip(group.name, group.kind, "a single unit")
        elif reads_inputs(step) and not readers(model, group):
            recorder.skip(group.name, group.kind, "not all that reads it are linear or ungrouped convolution layers")
        else:
            chosen.append(group)
    chosen = _without_partly_tied(chosen, traced, recorder)
    if not chosen:
        reasons = [f"{row.name}: {row.reason}" for row in recorder.layers[:5]]
        raise ConfigError(
            f"Prune: nothing that {' or '.join(f'{type(p).__name__}()' for p in step.patterns)} can cut.\n  "
            + ("\n  ".join([*reasons, *_other_kinds(traced, step)]) or _why_none(model))
        )
    return chosen


def _without_partly_tied(chosen: list[Group], traced: Trace, recorder: Recorder) -> list[Group]:
    """The groups but for those that must keep as many units as one that may be cut and is not among them."""
    left = [g for g in traced.groups if g.frozen is None and g.tied_count is not None and g not in chosen]
    whole = {g.tied_count: g.name for g in left}
    for group in chosen:
        if group.tied_count in whole:
            recorder.skip(
                group.name, group.kind, f"it keeps as many units as '{whole[group.tied_count]}', which is not cut"
            )
    return [group for group in chosen if group.tied_count not in whole]


def _other_kinds(traced: Trace, step: Prune) -> list[str]:
    """Units that could be cut, but are no units of this pattern."""
    others = [g for g in traced.groups if g.frozen is None and g.kind not in step.kinds]
    return [f"{g.name}: its units are {g.kind.replace('_', ' ')}, not {'/'.join(step.kinds)}" for g in others[:3]]


def _why_none(model: nn.Module) -> str:
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        return "The model is quantized already, and encoded weights are not cut: prune first, then quantize."
    return "The model has no such units; `gracile inspect` lists what it has."


def score_units(
    model: nn.Module,
    groups: list[Group],
    consumers: Mapping[str, list[Consumer]],
    step: Prune,
    context: Context,
    recorder: Recorder,
) -> dict[str, Tensor]:
    """One score for each unit of each group, higher is kept; a group that the criterion cannot score has none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    members = {m.tensor for g in groups for m in g.members if m.tensor in parameters}
    weights = sorted(name for name in members if parameters[name].ndim > 1)
    if step.below is not None and isinstance(step.criterion, Magnitude):
        return {g.name: unit_norms(g.members, {n: parameters[n].detach() for n in weights}) for g in groups}
    if hasattr(step.criterion, "unit_scores"):
        return score_groups(model, groups, consumers, step, context, recorder)
    elementwise = score_weights(model, weights, step.criterion, context, step.examples)
    if step.below is not None:
        return {g.name: reduce_scores(g.members, elementwise) for g in groups}
    return {g.name: step.pattern_of(g.kind).unit_scores(g.members, elementwise) for g in groups}


def choose_units(
    scored: ScoredGroups, step: Prune, context: Context, recorder: Recorder, timer: Timer | None = None
) -> Keep:
    """Indices kept of each group that loses any: by threshold, by a share of all units, or to a budget.

    A criterion that reads inputs then chooses again which units make up these widths: with a repair, group after group
    behind the cuts before.
    """
    if isinstance(step.allocation, MeasuredLoss):
        return _by_measured_loss(scored, step, context, recorder, timer)
    in_sequence = step.repair is not None and scores_by_inputs(step.criterion)
    if step.below is not None:
        removed = {n: min(int((s < step.below).sum()), s.numel() - 1) for n, s in scored.scores.items()}
        keep = keep_highest(scored.groups, scored.scores, removed, step)
    else:
        keep = _by_function(scored, step, context, timer)
    if keep and in_sequence:
        assert step.repair is not None
        return choose_in_sequence(
            scored.model, scored.traced, scored.groups, keep, step.criterion, step.repair, context
        ).keep
    return keep if step.below is not None else exchange_units(keep, scored.consumers, step.criterion)


def _by_measured_loss(
    scored: ScoredGroups, step: Prune, context: Context, recorder: Recorder, timer: Timer | None
) -> Keep:
    """Widths by tables of losses, against multiply-accumulates or against tables of latency; and the units of them."""
    latency: LatencyBudget | None = None
    if timer is not None:
        step = with_vector_widths(step)
        latency = prepare_latency(
            scored.model, scored.traced, scored.groups, step, context, scored.batch, timer, recorder
        )
        latency.check_within_reach(keep_highest(scored.groups, scored.scores, latency.most(scored.groups), step))
    assert isinstance(step.allocation, MeasuredLoss)
    tables = measure_tables(scored, step.allocation, context)
    keep = share_out(tables, step.allocation, scored, step, context, latency=latency)
    if keep and step.repair is not None and scores_by_inputs(step.criterion):
        keep = reallocate(keep, tables, scored, step, context, recorder, latency)
    else:
        keep = exchange_units(keep, scored.consumers, step.criterion)
    if latency is not None:
        recorder.numbers["latency_predicted_ms"] = latency.predicted_ms(keep)
    return keep


def _by_function(scored: ScoredGroups, step: Prune, context: Context, timer: Timer | None) -> Keep:
    """Widths by an allocation that looks at the scores alone."""
    allocation: Any = step.allocation or GlobalRank()
    costs = {g.name: float(weights_per_unit(scored.model, g)) for g in scored.groups}

    def at(fraction: float) -> Keep:
        if fraction <= 0:
            return {}
        return keep_highest(scored.groups, scored.scores, allocation(scored.scores, fraction, costs), step)

    if step.to is not None:
        largest = min(0.99, getattr(allocation, "max_fraction", 1.0))
        return meet_budget(step.to, scored.model, scored.traced, at, context, scored.batch, largest, timer)
    assert step.fraction is not None
    return at(step.fraction)


def _layers(group: Group, role: str) -> list[str]:
    return sorted({m.tensor.rpartition(".")[0] for m in group.members if m.role == role})


def _makers(model: nn.Module, group: Group, traced: Trace) -> list[str]:
    """The layers whose weight matrices make the group's units.

    A matrix that an embedding shares with the layer that reads its units is a consumer, and makes them all the same.
    """
    embeddings = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found = set()
    for member in group.members:
        if member.role == "producer" and len(traced.axes[member.tensor]) > 1:
            found.add(member.tensor.rpartition(".")[0])
        elif member.axis == 1 and id(tensors.get(member.tensor)) in embeddings:
            found.add(embeddings[id(tensors[member.tensor])])
    return sorted(found)
