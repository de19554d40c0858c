"""Quantized layers rounded by a solver, one after another, each on inputs that those before it have changed already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import DataError
from gracile.formats import Int, Levels
from gracile.graph import Trace
from gracile.modes import eval_mode
from gracile.nn import QuantizedLayer
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.solvers import RoundingSolver
from gracile.solvers.rounding import Rounded, rounding_problem
from gracile.stats.match import output_error, split_batches
from gracile.stats.moments import CannotRefitError, LayerMoments
from gracile.stats.rows import unfoldable
from gracile.steps.pruning.sequence import called_once, targets_of
from gracile.steps.quantization.grids import grid_of


@dataclass
class Rounding:
    """How layers came out of a solver.

    gains: layer -> the loss of its outputs as a share of what rounding to nearest leaves, 0 to 1. errors: the same as
    a share of the outputs' squares. raised: layer -> how often its damping grew tenfold, where it did. skipped: layers
    that stay rounded to nearest, and why. error, nearest_error: of the model's outputs on held-out batches, by the
    solver and by rounding to nearest. kept: whether the solver's weights are the model's.
    """

    gains: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    error: float = math.inf
    nearest_error: float = math.inf
    kept: bool = False


def round_in_sequence(
    model: nn.Module,
    reference: nn.Module,
    traced: Trace,
    weights: Mapping[str, Tensor],
    solver: RoundingSolver,
    ranges: Range,
    context: Context,
) -> Rounding:
    """Give quantized layers, rounded to nearest so far, the solver's weights; in place, in the order of the forward.

    Each layer is solved for what it gave in the reference, on the inputs that the layers before it, rounded already,
    and the grids of activations give it now; its bias takes up what is left of the mean. If the outputs on held-out
    batches come out no nearer to the reference's, all layers are rounded to nearest again.

    reference: the float model of the same layers. traced: of it. weights: layer -> the float weight that its codes
    stand for.
    """
    found = Rounding()
    reasons = solvable(reference, traced, weights)
    found.skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in weights:
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLayer) and grid_of(layer.weight_format, ranges) is None:
            found.skipped[name] = f"{type(layer.weight_format).__name__} has no scale to round by"
    order = [name for name in reasons if name not in found.skipped]
    if not order:
        return found
    held_out = split_batches(context.data)[1]
    found.nearest_error = output_error(model, reference, context.data, held_out)
    targets = targets_of(reference, traced, order, context)
    moments = LayerMoments(model, targets, norms=dict(traced.batch_norm_pairs()))
    changed = [*order, *(moments.norms[name] for name in order if name in moments.norms)]
    before = {name: _state(model, name) for name in changed}
    with eval_mode(model, reference):
        for done, name in enumerate(order):
            try:
                solved = round_layer(moments, name, weights[name], solver, ranges)
                found.gains[name], found.errors[name] = solved.gain, solved.error
                if solved.raised:
                    found.raised[name] = solved.raised
            except CannotRefitError as failure:
                found.skipped[name] = str(failure)
            context.progress("round", done + 1, len(order))
    moments.replay.clear()
    found.error = output_error(model, reference, context.data, held_out)
    found.kept = found.error < found.nearest_error
    if not found.kept:
        for name, state in before.items():
            model.get_submodule(name).load_state_dict(state)
    return found


def record_rounding(done: Rounding, title: str, recorder: Recorder) -> None:
    """Say of the quantized layers' rows what the solver made of them."""
    if done.gains:
        recorder.numbers["output_error_nearest"] = done.nearest_error
        recorder.notes.append(
            f"{title} {'rounded' if done.kept else 'was taken back on'} {len(done.gains)} layers: output error on "
            f"held-out batches {done.error:.3g} with it, {done.nearest_error:.3g} by rounding to nearest."
        )
    else:
        recorder.notes.append(f"{title} can round none of these layers: all are rounded to nearest.")
    for i, row in enumerate(recorder.layers):
        if row.name in done.skipped and row.action == "quantized":
            recorder.layers[i] = replace(row, reason=f"rounded to nearest: {done.skipped[row.name]}")
        elif done.kept and row.name in done.gains and row.action == "quantized":
            reason = f"{title}: {done.gains[row.name]:.3g} of the output error of rounding to nearest"
            if row.name in done.raised:
                times = 10 ** done.raised[row.name]
                reason += f"; its moments had no Cholesky factor until damped {times} times as much"
            recorder.layers[i] = replace(row, error=done.errors[row.name], reason=reason)


def solvable(reference: nn.Module, traced: Trace, layers: Iterable[str]) -> dict[str, str | None]:
    """Layer -> why no solver can round it, or None, in the order of the forward; of the float model."""
    once = {name: i for i, name in enumerate(called_once(reference, traced))}
    reasons: dict[str, str | None] = {}
    for name in sorted(layers, key=lambda name: once.get(name, len(once))):
        if not unfoldable(reference.get_submodule(name)):
            reasons[name] = "its inputs do not unfold into rows of its weight"
        else:
            reasons[name] = None if name in once else "called more than once, or tied to another layer"
    return reasons


@dataclass(frozen=True)
class LayerRounding:
    """One layer's loss as a share of what rounding to nearest leaves (`gain`) and of its outputs' squares (`error`).

    raised: how often the damping grew tenfold.
    """

    gain: float
    error: float
    raised: int


def round_layer(
    moments: LayerMoments, name: str, weight: Tensor, solver: RoundingSolver, ranges: Range
) -> LayerRounding:
    """Give one quantized layer of the moments' model the solver's codes, and its bias what is left of the mean.

    weight: the float one that the codes stand for. Raises CannotRefitError where the layer reads other tokens than in
    the original.
    """
    layer = moments.model.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    grid = grid_of(layer.weight_format, ranges)
    assert grid is not None
    measured = moments.measure(name)
    prior = weight.detach().double().cpu().flatten(1)
    if measured.gram.ndim == 3:
        prior = prior.unflatten(0, (len(measured.gram), -1))
    centred = moments.centred(name)
    problem = rounding_problem(prior, measured, centred, solver.damping, solver.asymmetry)
    rounded = solver(prior, problem, grid)
    if not bool(torch.isfinite(rounded.weight).all()):
        raise DataError(f"Layer '{name}' {tuple(weight.shape)}: its rounded weight is not finite.")
    stored = _encode(layer, rounded)
    layer.set_weight(stored)
    if centred:
        decoded = layer.decoded_weight().double().cpu().reshape(prior.shape)
        target = solver.asymmetry * measured.mean_target
        target = target + (1 - solver.asymmetry) * (prior @ measured.mean.unsqueeze(-1)).squeeze(-1)
        moments.shift(name, (target - (decoded @ measured.mean.unsqueeze(-1)).squeeze(-1)).flatten())
    loss, baseline = float(rounded.loss.sum()), float(rounded.nearest_loss.sum())
    signal = float(problem.loss(torch.zeros_like(problem.target)).sum())
    return LayerRounding(loss / max(baseline, 1e-300), loss / max(signal, 1e-300), problem.raised)


def _encode(layer: QuantizedLayer, rounded: Rounded) -> dict[str, Tensor]:
    fmt = layer.weight_format
    assert isinstance(fmt, (Int, Levels))
    shape = fmt.scale_shape(layer.weight_shape)
    scale, zero = (t.flatten()[: math.prod(shape)].reshape(shape).float() for t in (rounded.scale, rounded.zero))
    weight = rounded.weight.reshape(layer.weight_shape).float()
    if isinstance(fmt, Levels) or fmt.symmetric:
        return fmt.encode(weight, scale)
    return fmt.encode(weight, scale, zero.to(torch.int16))


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
