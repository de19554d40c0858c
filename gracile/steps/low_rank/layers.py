"""Layers factorized one after another, each on the inputs that those before it leave, to what the original gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import DataError, ModelError
from gracile.graph import Trace, check_change
from gracile.modes import eval_mode
from gracile.nn import Factorized
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.solvers import LeastSquares, Moments
from gracile.solvers.low_rank import squared_error, symmetric, target_energy
from gracile.stats.collect import collect_activations
from gracile.stats.match import split_batches
from gracile.stats.moments import CannotRefitError
from gracile.stats.refit import Refit
from gracile.stats.targets import Targets
from gracile.steps.low_rank.select import Candidate, Rank, Run, overwriting, product_of, swap_of
from gracile.steps.low_rank.solve import decompose
from gracile.steps.pruning.sequence import targets_of
from gracile.surgery import apply

if TYPE_CHECKING:
    from gracile.steps.factorize import Factorize


def factorize_layers(
    model: nn.Module,
    reference: nn.Module,
    traced: Trace,
    ranks: Mapping[Candidate, Rank | None],
    step: Factorize,
    targets: Targets,
    context: Context,
    recorder: Recorder,
) -> None:
    """Put two layers of the rank in place of each, in the order given, which is that of the forward; and record it.

    ranks: None for a layer that stays whole, and is refitted if the step has a repair and a layer before it changed.
    reference: the model before, whose outputs are the targets. Of the fit to these and of what the weight as it was
    gives, that with the smaller error on held-out batches is taken. The intercept goes into the bias, or into the
    running mean of the batch norm behind.
    """
    names = [candidate.name for candidate in ranks]
    norms = dict(traced.batch_norm_pairs())
    held_out = targets_of(reference, traced, names, context, batches=split_batches(context.data)[1])
    fit, judge = Refit(model, targets, norms=norms), Refit(model, held_out, norms=norms)
    modes = {name: model.get_submodule(name).training for name in names}
    fitted, total = 0, 0
    with eval_mode(model, reference):
        for done, (candidate, rank) in enumerate(ranks.items()):
            if rank is not None:
                total += 1
                fitted += _factorize(model, candidate, rank, step, fit, judge, context, recorder)
            elif total and step.repair is not None:
                _refit(model, candidate, step.repair, fit, judge, recorder)
            context.progress("factorize", done + 1, len(ranks))
    for name, training in modes.items():
        model.get_submodule(name).train(training)
    recorder.notes.append(
        f"Of {total} layers factorized, {fitted} are fitted to the original's outputs; of the others the weight as it "
        f"was does better on held-out batches."
    )


def _factorize(
    model: nn.Module,
    candidate: Candidate,
    rank: Rank,
    step: Factorize,
    fit: Refit,
    judge: Refit,
    context: Context,
    recorder: Recorder,
) -> bool:
    """Factorize one layer; whether by the fit to the original's outputs."""
    name, centre = candidate.name, fit.centred(candidate.name)
    old: Any = model.get_submodule(name)
    prior = old.weight.detach().flatten(1).cpu()
    moments, judged = _moments(model, name, prior, fit, judge, context)
    by_targets, by_weight = (
        decompose(step, candidate, prior, aims, centre, spatial=rank.spatial).factors(rank.value)
        for aims in (moments, symmetric(prior, moments.gram, moments.mean))
    )
    errors = [squared_error(factors.product, factors.shift, judged) for factors in (by_targets, by_weight)]
    better = errors[0] < errors[1]
    factors = by_targets if better else by_weight
    edit = swap_of(candidate, rank)
    apply(model, [edit])
    recorder.edits.append(edit)
    new: Any = model.get_submodule(name)
    new.set_factors(factors.first, factors.second)
    _shift(model, name, factors.shift, fit.norms)
    energy = target_energy(judged, centre)
    recorder.layers.append(
        LayerRow(
            name=name,
            kind=candidate.kind,
            action="factorized",
            kept=rank.value,
            of=candidate.full_rank(rank.spatial),
            error=min(errors) / energy if energy > 0 else None,
            reason=("along the sides of its kernel, " if rank.spatial else "")
            + ("fitted to the original's outputs" if better else "decomposed as it was"),
        )
    )
    return better


@torch.no_grad()
def _refit(
    model: nn.Module, candidate: Candidate, solver: LeastSquares, fit: Refit, judge: Refit, recorder: Recorder
) -> None:
    """Refit a layer that stays whole, if that lowers its error on held-out batches."""
    name, centre = candidate.name, fit.centred(candidate.name)
    layer: Any = model.get_submodule(name)
    prior = layer.weight.flatten(1).double().cpu()
    try:
        moments, judged = fit.measure(name), judge.measure(name)
    except CannotRefitError as problem:
        recorder.skip(name, candidate.kind, f"not refitted: {problem}")
        return
    solved, shift = solver(prior, moments, centre)
    if bool((prior == 0).any()):  # weights that were pruned stay so, and the intercept is that of the others
        solved = solved.masked_fill(prior == 0, 0.0)
        shift = moments.mean_target - solved @ moments.mean if centre else shift
    before = squared_error(prior, torch.zeros_like(shift), judged)
    after = squared_error(solved, shift, judged)
    if after < before:
        layer.weight.copy_(solved.reshape(layer.weight.shape))
        _shift(model, name, shift, fit.norms)
        energy = target_energy(judged, centre)
        error = after / energy if energy > 0 else None
        recorder.layers.append(LayerRow(name=name, kind=candidate.kind, action="refitted", error=error))


def prove_factorized(model: nn.Module, reference: nn.Module, run: Run, recorder: Recorder) -> None:
    """The factorized model is the one before with the products as weights, in float64; raises ModelError if it is not.

    What else differs counts as changed alike: biases, batch-norm statistics, refitted weights.
    """
    changes = {}
    tensors = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors and value.data_ptr() != tensors[name].data_ptr():
            changes[name] = overwriting(value.detach())
    for name, layer in model.named_modules():
        if isinstance(layer, Factorized) and not isinstance(reference.get_submodule(name), Factorized):
            changes[f"{name}.weight"] = overwriting(product_of(layer))
            if layer.bias is not None:
                changes[f"{name}.bias"] = overwriting(layer.bias.detach())
    check = check_change(reference, changes, model, run, "factorized")
    if not check.exact:
        raise ModelError(
            f"Factorize: {check.reason} than the model with the products of the factors as weights.\n  "
            f"Its forward depends on more than its layers' outputs; exclude layers, one half at a time, to find which."
        )
    assert check.max_error is not None
    recorder.numbers["factorized_error"] = check.max_error
    recorder.notes.append("The factorized model equals the original with the products as weights (float64).")


def _moments(
    model: nn.Module, name: str, prior: Tensor, fit: Refit, judge: Refit, context: Context
) -> tuple[Moments, Moments]:
    """Moments to fit on and to judge by. Where the layer now sees other tokens than in the original, so that nothing
    says what it should make of them, what its weight makes of them is both."""
    try:
        moments, judged = fit.measure(name), judge.measure(name)
    except CannotRefitError:
        stats = collect_activations(model, [name], {"gram", "input_mean"}, context.data)[name]
        assert stats.gram is not None and stats.input_mean is not None
        moments = judged = symmetric(prior, stats.gram[0].double().cpu() / 2, stats.input_mean.double().cpu())
    if not all(bool(torch.isfinite(m.gram).all() & torch.isfinite(m.cross).all()) for m in (moments, judged)):
        raise DataError(
            f"Factorize: layer '{name}' has inputs that are NaN or infinite once the layers before it are factorized.\n"
            f"  Exclude it, or factorize less."
        )
    return moments, judged


@torch.no_grad()
def _shift(model: nn.Module, name: str, shift: Tensor, norms: Mapping[str, str]) -> None:
    """Add to the layer's bias, or take from the running mean of the batch norm that alone reads it."""
    layer: Any = model.get_submodule(name)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double().cpu() + shift)
    elif name in norms:
        norm: Any = model.get_submodule(norms[name])
        if norm.running_mean is not None:  # without, it takes out the mean of the batch by itself
            norm.running_mean.copy_(norm.running_mean.double().cpu() - shift)
