"""Ranks of layers: what each does to the outputs and saves, measured for one layer at a time, and the best choice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import ConfigError
from gracile.evaluate.size import state_bytes
from gracile.goal import Budget, Bytes, MACs, Parameters
from gracile.graph import Trace
from gracile.knapsack import choose_options
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.solvers.base import Factors
from gracile.solvers.low_rank import squared_error
from gracile.stats.match import divergence
from gracile.stats.refit import Refit
from gracile.stats.replay import Replay
from gracile.stats.targets import Targets
from gracile.steps.low_rank.select import Candidate, Rank
from gracile.steps.low_rank.solve import decompose
from gracile.steps.pruning.tables import outputs_of, some_batches

if TYPE_CHECKING:
    from gracile.steps.factorize import Factorize


@dataclass(frozen=True)
class Option:
    """A rank that a layer may take: what that does to the outputs, and what it saves. rank: None leaves it whole."""

    rank: Rank | None
    loss: float
    saved: float


Options = dict[str, list[Option]]  # by layer; staying whole is among them


def ranks_of(candidate: Candidate, levels: int, multiple_of: int) -> list[Rank]:
    """Ranks to try, of each form ascending: equal steps up to where nothing is saved, which is left out.

    Rounded to multiples of the largest power of two up to `multiple_of` that the largest holds twice.
    """
    ranks = []
    for spatial in candidate.forms:
        largest = candidate.largest_rank(spatial)
        step = 1
        while 2 * step <= multiple_of and 4 * step <= largest:
            step *= 2
        even = (largest * i / (levels + 1) for i in range(1, levels + 2) if largest)
        values = {max(1, min(round(rank / step), largest // step)) * step for rank in even}
        ranks += [Rank(value, spatial) for value in sorted(values)]
    return ranks


def measure_losses(
    model: nn.Module,
    traced: Trace,
    ranks: Mapping[Candidate, Sequence[Rank]],
    step: Factorize,
    targets: Targets,
    saved: Callable[[Candidate, Rank], float],
    context: Context,
    recorder: Recorder,
) -> dict[str, dict[Rank, float]]:
    """Layer -> rank -> divergence of the outputs from the model's, this layer alone being of that rank.

    On the inputs of the model as it is, whose outputs are the targets. Nothing is factorized: the product is put in the
    weight's place. Ranks with which outputs are not finite are left out, and so is a layer that has no other; and ranks
    that another one of the layer is better than, which saves no less and is nearer to what the layer gives.
    """
    batches = some_batches(context.data, step.examples)
    trial = copy.deepcopy(model).eval()
    references = outputs_of(trial, context.data, batches)
    replay, repair = Replay(trial, context.data, batches), Refit(trial, targets, norms=dict(traced.batch_norm_pairs()))
    losses: dict[str, dict[Rank, float]] = {}
    with eval_mode(model):
        for done, (candidate, tried) in enumerate(ranks.items()):
            name = candidate.name
            moments = repair.measure(name)
            if not bool(torch.isfinite(moments.gram).all() & torch.isfinite(moments.cross).all()):
                recorder.skip(name, candidate.kind, "its inputs or outputs are not finite")
                continue
            weight: Tensor = trial.get_submodule(name).weight.detach()  # type: ignore[operator,union-attr,assignment]
            centre, prior = repair.centred(name), weight.flatten(1).cpu()
            found = {
                spatial: decompose(step, candidate, prior, moments, centre, spatial=spatial, roughly=True)
                for spatial in {rank.spatial for rank in tried}
            }
            factors = ((rank, found[rank.spatial].factors(rank.value)) for rank in tried)
            errors = {rank: squared_error(f.product, f.shift, moments) for rank, f in factors}
            replay.seek(name)
            losses[name] = {}
            for rank in not_dominated(errors, {rank: saved(candidate, rank) for rank in tried}):
                undo = _put(trial, name, found[rank.spatial].factors(rank.value), repair.norms)
                with torch.no_grad():
                    loss = divergence(replay.outputs(), references)
                    for tensor, value in undo:
                        tensor.copy_(value)
                if math.isfinite(loss):
                    losses[name][rank] = loss
            if not losses[name]:
                recorder.skip(name, candidate.kind, "outputs are not finite with it factorized")
            context.progress("rank tables", done + 1, len(ranks))
    return {name: found for name, found in losses.items() if found}


def not_dominated(errors: Mapping[Rank, float], saved: Mapping[Rank, float]) -> list[Rank]:
    """The ranks, in their order, but for those of which another one saves no less at a smaller error."""
    return [r for r in errors if not any(saved[o] >= saved[r] and errors[o] < errors[r] for o in errors)]


def saved_of(candidate: Candidate, rank: Rank, budget: Budget | None) -> float:
    """What a rank saves in the budget's unit, exactly; weights where there is no budget."""
    if isinstance(budget, MACs):
        return candidate.macs - candidate.macs_at(rank)
    weights = candidate.weights - candidate.weights_at(rank)
    return float(weights * candidate.element_bytes if isinstance(budget, Bytes) else weights)


def options_of(
    candidates: Sequence[Candidate], losses: Mapping[str, Mapping[Rank, float]], budget: Budget | None
) -> Options:
    """The ranks whose losses are known with what they save; those that save nothing are left out."""
    found = {
        c.name: [Option(r, loss, saved_of(c, r, budget)) for r, loss in losses.get(c.name, {}).items()]
        for c in candidates
    }
    return {name: [Option(None, 0.0, 0.0), *(o for o in row if o.saved > 0)] for name, row in found.items() if row}


def amount_to_save(
    options: Options, candidates: Sequence[Candidate], step: Factorize, model: nn.Module, traced: Trace
) -> float:
    """How much is to go, in the unit of the options. Raises ConfigError, naming what can be reached, for too much."""
    most = sum(max(option.saved for option in row) for row in options.values())
    if step.fraction is not None:
        whole = sum(candidate.weights for candidate in candidates)
        amount = step.fraction * whole
        if amount > most:
            raise ConfigError(
                f"Factorize({step.fraction:g}): at the lowest ranks tried, {most / whole:.3f} of the {whole} weights "
                f"of {len(candidates)} layers go.\n  Ask for less; more levels= try lower ranks."
            )
        return amount
    assert step.to is not None
    original = _whole_cost(step.to, model, traced)
    amount = original - step.to.limit(original)
    if amount <= 0:
        raise ConfigError(f"Factorize(to={step.to}): the model is within this budget already ({original:g}).")
    if amount > most:
        raise ConfigError(
            f"Factorize(to={step.to}): cannot be met; the nearest that can be reached by the lowest ranks tried is "
            f"{original - most:g} of {original:g} ({1 - most / original:.3f}).\n  Ask for at least that, allow more "
            f"layers to be factorized, or try lower ranks by more levels=."
        )
    return amount


def choose_ranks(options: Options, amount: float, power: float) -> dict[str, Rank]:
    """The rank of each layer that does not stay whole: Σ loss^power the least that saves the amount."""
    picked = choose_options([[(o.loss**power, o.saved) for o in row] for row in options.values()], amount)
    chosen = {name: row[i].rank for (name, row), i in zip(options.items(), picked)}
    return {name: rank for name, rank in chosen.items() if rank is not None}


def _whole_cost(budget: Budget, model: nn.Module, traced: Trace) -> float:
    if isinstance(budget, MACs):
        return float(traced.macs)
    assert isinstance(budget, (Parameters, Bytes))
    return float(state_bytes(model) if isinstance(budget, Bytes) else sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def _put(model: nn.Module, name: str, factors: Factors, norms: Mapping[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Let the layer compute with the product of the factors; returns the tensors changed, with their old values."""
    layer: Any = model.get_submodule(name)
    changed = [(layer.weight, factors.product.reshape(layer.weight.shape))]
    if layer.bias is not None:
        changed.append((layer.bias, layer.bias.double().cpu() + factors.shift))
    elif name in norms:
        norm: Any = model.get_submodule(norms[name])
        if norm.running_mean is not None:  # without, it takes out the mean of the batch by itself
            changed.append((norm.running_mean, norm.running_mean.double().cpu() - factors.shift))
    undo = [(tensor, tensor.detach().clone()) for tensor, _ in changed]
    for tensor, value in changed:
        tensor.copy_(value)
    return undo
