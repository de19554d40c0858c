"""How much to cut for a budget of MACs, parameters, bytes or measured latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError
from gracile.evaluate.size import state_bytes
from gracile.goal import Budget, Bytes, Latency, MACs, Parameters
from gracile.graph import Trace, cut_macs, plan_resize, trace
from gracile.sharing import share_parameters
from gracile.steps.latency.timing import Timer
from gracile.surgery import apply

Keep = dict[str, list[int]]
BISECTIONS = 20  # of a fraction in [0, 1]: finer than one unit of any layer met in practice
LATENCY_BISECTIONS = 6  # each exports and times a candidate; widths in steps of 1/64


def meet_budget(
    budget: Budget,
    model: nn.Module,
    traced: Trace,
    at: Callable[[float], Keep],
    context: Context,
    batch: Batch,
    largest: float = 0.99,
    timer: Timer | None = None,
) -> Keep:
    """The units kept by the smallest fraction removed, by bisection, whose cost is within the budget.

    at: fraction of units removed -> units kept. largest: the largest fraction that `at` takes. timer: for latency.
    Raises ConfigError naming the nearest cost that can be reached.
    """
    cost = _cost(budget, model, traced, context, batch, timer)
    original = cost({}) if timer is None else timer.whole_ms
    limit = budget.limit(original)
    low, high = 0.0, largest
    if original <= limit:
        raise ConfigError(f"Prune(to={budget}): the model is within this budget already ({original:g}).")
    reached = cost(at(high))
    if reached > limit:
        raise ConfigError(
            f"Prune(to={budget}): cannot be met; the nearest that can be reached by cutting is {reached:g} of "
            f"{original:g} ({reached / original:.3f}).\n  Ask for at least that, or allow more layers to be cut."
        )
    for _ in range(LATENCY_BISECTIONS if isinstance(budget, Latency) else BISECTIONS):
        middle = (low + high) / 2
        if cost(at(middle)) <= limit:
            high = middle
        else:
            low = middle
    return at(high)


def _cost(
    budget: Budget, model: nn.Module, traced: Trace, context: Context, batch: Batch, timer: Timer | None
) -> Callable[[Mapping[str, Sequence[int]]], float]:
    if isinstance(budget, MACs):
        return lambda keep: float(cut_macs(traced, keep))
    return lambda keep: cost_of(budget, cut_copy(model, traced, keep), context, batch, timer)


def cost_of(budget: Budget, model: nn.Module, context: Context, batch: Batch, timer: Timer | None = None) -> float:
    """What the model costs, in the budget's unit: MACs of an example, parameters, bytes, or milliseconds of a batch.

    timer: for latency, which is measured relative to its model's, so that a slower minute changes nothing.
    """
    if isinstance(budget, MACs):
        return float(trace(model, lambda net: context.data.forward(net, batch)).macs)
    if isinstance(budget, Bytes):
        return float(state_bytes(model))
    if isinstance(budget, Parameters):
        return float(sum(p.numel() for p in model.parameters()))
    assert isinstance(budget, Latency) and timer is not None
    return timer.relative(model) * timer.whole_ms


def whole_cost(budget: Budget, model: nn.Module, context: Context, batch: Batch, timer: Timer | None) -> float:
    """What the model costs before anything is cut; its timer has measured its latency already."""
    return timer.whole_ms if timer is not None else cost_of(budget, model, context, batch)


def cut_copy(model: nn.Module, traced: Trace, keep: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy that has only these units; whole without any. Raises ConfigError where groups cannot be cut together."""
    trial = share_parameters(model)
    if keep:
        apply(trial, [plan_resize(traced, keep)])
    return trial
