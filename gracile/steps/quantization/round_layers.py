"""Quantized layers rounded by a solver, one after another, each on inputs that those before it have changed already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from gracile.context import Context
from gracile.graph import Trace
from gracile.modes import eval_mode
from gracile.nn import QuantizedLayer
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.solvers import RoundingSolver
from gracile.stats.match import output_error, split_batches
from gracile.stats.moments import CannotRefitError, LayerMoments
from gracile.stats.rows import unfoldable
from gracile.steps.pruning.sequence import called_once, targets_of
from gracile.steps.quantization.finished_parts import FinishedParts, states_of
from gracile.steps.quantization.grids import grid_of
from gracile.steps.quantization.round_recurrent import round_recurrent
from gracile.steps.quantization.solve_rounding import LayerRounding, rounding_of, solve_rounding


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

    def take(self, name: str, gain: float = 1.0, error: float = 0.0, raised: int = 0, skipped: str = "") -> None:
        """Note how one layer came out."""
        if skipped:
            self.skipped[name] = skipped
            return
        self.gains[name], self.errors[name] = gain, error
        if raised:
            self.raised[name] = raised


def round_in_sequence(
    model: nn.Module,
    reference: nn.Module,
    traced: Trace,
    weights: Mapping[str, Tensor],
    solver: RoundingSolver,
    ranges: Range,
    context: Context,
    recurrent: Iterable[str] = (),
) -> Rounding:
    """Give quantized layers, rounded to nearest so far, the solver's weights; in place, in the order of the forward.

    Each layer is solved for what it gave in the reference, on the inputs that the layers before it, rounded already,
    and the grids of activations give it now; its bias takes up what is left of the mean. If the outputs on held-out
    batches come out no nearer to the reference's, all layers are rounded to nearest again. Finished layers are kept in
    the context's directory, and a step that was interrupted goes on behind them.

    reference: the float model of the same layers. traced: of it. weights: layer -> the float weight that its codes
    stand for. recurrent: layers of these, whose matrices are solved one after another (`round_recurrent`).
    """
    found, recurrent = Rounding(), set(recurrent)
    reasons = solvable(reference, traced, {*weights, *recurrent})
    found.skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    order = [name for name in reasons if name not in found.skipped]
    if not order:
        return found
    held_out = split_batches(context.data)[1]
    found.nearest_error = output_error(model, reference, context.data, held_out)
    targets = targets_of(reference, traced, [name for name in order if name in weights], context)
    moments = LayerMoments(model, targets, norms=dict(traced.batch_norm_pairs()))
    changed = [*order, *(moments.norms[name] for name in order if name in moments.norms)]
    before, finished = states_of(model, changed), FinishedParts(context.directory, "rounded")
    with eval_mode(model, reference):
        for done, name in enumerate(order):
            touched = [name, *([moments.norms[name]] if name in moments.norms else [])]
            numbers = finished.restore(name, done, model, touched)
            if numbers is None:
                numbers = _numbers(moments, name, weights.get(name), solver, ranges)
                finished.keep(name, done, model, touched, numbers)
            found.take(name, **numbers)
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
            reason += f"; {row.reason}" if row.reason else ""
            recorder.layers[i] = replace(row, error=done.errors[row.name], reason=reason)


def solvable(reference: nn.Module, traced: Trace, layers: Iterable[str]) -> dict[str, str | None]:
    """Layer -> why no solver can round it, or None, in the order of the forward; of the float model."""
    once = {name: i for i, name in enumerate(called_once(reference, traced))}
    reasons: dict[str, str | None] = {}
    for name in sorted(layers, key=lambda name: once.get(name, len(once))):
        layer = reference.get_submodule(name)
        if not isinstance(layer, nn.RNNBase) and not unfoldable(layer):
            reasons[name] = "its inputs do not unfold into rows of its weight"
        else:
            reasons[name] = None if name in once else "called more than once, or tied to another layer"
    return reasons


def round_layer(
    moments: LayerMoments, name: str, weight: Tensor, solver: RoundingSolver, ranges: Range
) -> LayerRounding:
    """Give one quantized layer of the moments' model the solver's codes, and its bias what is left of the mean.

    weight: the float one that the codes stand for. Raises CannotRefitError where the layer reads other tokens than in
    the original.
    """
    layer = moments.model.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    grid = grid_of(layer.weight_format, ranges, layer.encoded_weight())
    measured = moments.measure(name)
    prior = weight.detach().double().cpu().flatten(1)
    if measured.gram.ndim == 3:
        prior = prior.unflatten(0, (len(measured.gram), -1))
    solved = solve_rounding(name, prior, measured, moments.centred(name), solver, grid)
    layer.set_weight(solved.encode(layer.weight_shape))
    if moments.centred(name):
        moments.shift(name, solved.shift(layer.decoded_weight().double().cpu()))
    return rounding_of([solved])


def _numbers(
    moments: LayerMoments, name: str, weight: Tensor | None, solver: RoundingSolver, ranges: Range
) -> dict[str, Any]:
    """How a layer came out, as plain data."""
    try:
        return asdict(round_one(moments, name, weight, solver, ranges))
    except CannotRefitError as failure:
        return {"skipped": str(failure)}


def round_one(
    moments: LayerMoments, name: str, weight: Tensor | None, solver: RoundingSolver, ranges: Range
) -> LayerRounding:
    """`round_layer`, or `round_recurrent` where there is no single weight. weight: None for recurrent layers."""
    if weight is None:
        return _round_recurrent(moments, name, solver, ranges)
    return round_layer(moments, name, weight, solver, ranges)


def _round_recurrent(moments: LayerMoments, name: str, solver: RoundingSolver, ranges: Range) -> LayerRounding:
    """The same for the matrices of a recurrent layer."""
    targets = moments.targets
    return round_recurrent(
        moments.model.get_submodule(name),
        targets.original.get_submodule(name),
        moments.replay.run,
        lambda i: targets.data.forward(targets.original, targets.batches[i]),
        len(targets.batches),
        solver,
        ranges,
    )
