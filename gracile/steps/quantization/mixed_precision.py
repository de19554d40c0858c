"""The number format of each layer, so that the model fits its bytes or its latency and its outputs change least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gracile.context import Context
from gracile.errors import ConfigError
from gracile.evaluate.size import state_bytes
from gracile.formats import Scheme, is_dynamic
from gracile.goal import Bytes, Latency
from gracile.graph import Trace
from gracile.knapsack import choose_options
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.solvers import RoundingSolver
from gracile.steps.latency.timing import Timer
from gracile.steps.quantization.format_latency import FormatLatency
from gracile.steps.quantization.format_trial import FormatTrial
from gracile.steps.quantization.prepared import option_title
from gracile.steps.quantization.quantize_layers import Encoder, format_for
from gracile.steps.quantization.quantize_recurrent import matrices

#: So often the choice is made anew from what each layer's neighbouring options do where the others are as chosen.
ROUNDS = 3


def choose_schemes(
    model: nn.Module,
    traced: Trace,
    options: Mapping[str, Sequence[Scheme | None]],
    units: Mapping[str, Sequence[str]],
    budget: Bytes | Latency,
    encoder: Encoder,
    solver: RoundingSolver | None,
    context: Context,
    recorder: Recorder,
    timer: Timer | None = None,
    *,
    correct: bool,
) -> dict[str, Scheme | None]:
    """argmin of the outputs' error over one scheme of each layer, subject to the bytes or the latency of the model.

    First by the sum of what each layer's schemes do alone, a knapsack. Schemes that another one beats, in the budget
    and in that, are out. Then, up to ROUNDS times, by what each layer's next smaller and next larger schemes do where
    all others are as chosen: a knapsack again, whose choice is kept if the model of it has less. By a draft of the
    solver where there is one, and corrected as the step corrects (`FormatTrial`). Bytes are those of the model's
    tensors as stored; latency is timed (`FormatLatency`), and what is chosen was measured within the budget. Raises
    ConfigError where no choice fits, with the least that can be reached.

    model: the float model, which is left as it is. traced: of it. options: schemes of each unit, by its first layer;
    None: it stays in floating point. units: the first layer -> all that hold its weight and take its scheme. timer:
    of the float model, for a budget of latency. Returns the schemes of all layers.
    """
    trial = FormatTrial(model, traced, units, encoder, solver, context, correct)
    with eval_mode(model):
        if isinstance(budget, Bytes):
            chosen = _within_bytes(trial, model, options, budget, context, recorder)
        else:
            assert timer is not None, "a budget of latency comes with a timer"
            latency = FormatLatency(model, traced, units, options, encoder, timer, context, recorder)
            chosen = _within_latency(trial, latency, budget, context, recorder)
    found = {name: options[name][i] for name, i in chosen.items()}
    names = dict.fromkeys(option_title(scheme) for schemes in options.values() for scheme in schemes)
    counts = {name: sum(option_title(scheme) == name for scheme in found.values()) for name in names}
    shares = ", ".join(f"{count} layers in {name}" for name, count in counts.items())
    recorder.notes.append(f"Mixed precision for {budget}: {shares}; chosen by the measured error of the outputs.")
    return {each: found[name] for name in found for each in units[name]}


def _within_bytes(
    trial: FormatTrial,
    model: nn.Module,
    options: Mapping[str, Sequence[Scheme | None]],
    budget: Bytes,
    context: Context,
    recorder: Recorder,
) -> dict[str, int]:
    whole, original = state_bytes(model), state_bytes(context.original)
    limit = budget.limit(original)
    saved = {
        name: [_bytes_saved(trial.units[name], model, scheme, trial.encoder) for scheme in schemes]
        for name, schemes in options.items()
    }
    least = whole - sum(max(each) for each in saved.values())
    if least > limit:
        raise ConfigError(
            f"Quantize(to={budget}): cannot be met; the nearest that these options reach is {least:g} of {original:g} "
            f"bytes ({least / original:.3f}).\n  Ask for at least that, or add an option of fewer bits."
        )
    losses = _single_losses(trial, options, context)
    fronts = {name: _front(losses[name], saved[name]) for name in options}
    items = [[(losses[name][i], saved[name][i]) for i in fronts[name]] for name in options]
    picked = choose_options(items, whole - limit)
    chosen = {name: fronts[name][i] for name, i in zip(options, picked, strict=True)}
    recorder.numbers["predicted_loss"] = sum(losses[name][i] for name, i in chosen.items())
    chosen = _refine(trial, options, saved, fronts, chosen, whole - limit, context, recorder)
    recorder.numbers["bytes"] = whole - sum(saved[name][i] for name, i in chosen.items())
    return chosen


def _within_latency(
    trial: FormatTrial, latency: FormatLatency, budget: Latency, context: Context, recorder: Recorder
) -> dict[str, int]:
    latency.check(budget)
    losses = _single_losses(trial, latency.options, context)
    chosen = latency.meet(budget, losses)
    recorder.numbers["predicted_loss"] = sum(losses[name][i] for name, i in chosen.items())
    fronts = {name: _front(losses[name], saved) for name, saved in latency.saved.items()}
    for name, i in chosen.items():  # the search looks at all options, of which noise may have put one behind another
        fronts[name] = sorted({*fronts[name], i})
    amount = sum(latency.saved[name][i] for name, i in chosen.items())
    refined = _refine(trial, latency.options, latency.saved, fronts, chosen, amount, context, recorder)
    if refined != chosen and not latency.within(budget, refined):
        recorder.notes.append("The choice by the layers' neighbouring formats was timed beyond the budget, and left.")
        refined = chosen
    recorder.numbers["latency_predicted_ms"] = latency.predict(refined) * latency.timer.whole_ms
    return refined


def measure_losses(
    model: nn.Module,
    traced: Trace,
    options: Mapping[str, Sequence[Scheme | None]],
    units: Mapping[str, Sequence[str]],
    encoder: Encoder,
    solver: RoundingSolver | None,
    context: Context,
    *,
    correct: bool,
) -> dict[str, list[float]]:
    """Layer -> the error of the outputs (`FormatTrial`) by each of its schemes, all other layers as they are."""
    with eval_mode(model):
        trial = FormatTrial(model, traced, units, encoder, solver, context, correct)
        return _single_losses(trial, options, context)


def _single_losses(
    trial: FormatTrial, options: Mapping[str, Sequence[Scheme | None]], context: Context
) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {}
    for done, name in enumerate(trial.order):
        held = trial.held(name)
        losses[name] = [trial.loss(name, scheme) for scheme in options[name]]
        trial.put_back(name, held)
        context.progress("sensitivity", done + 1, len(trial.order))
    return losses


def _refine(
    trial: FormatTrial,
    options: Mapping[str, Sequence[Scheme | None]],
    saved: Mapping[str, Sequence[float]],
    fronts: Mapping[str, Sequence[int]],
    chosen: dict[str, int],
    amount: float,
    context: Context,
    recorder: Recorder,
) -> dict[str, int]:
    """The choice after rounds of what neighbouring options of each layer do beside all others as chosen."""
    if not ROUNDS:
        return chosen
    present = _error_of(trial, options, chosen)
    told = [present]
    for _ in range(ROUNDS):
        items = []
        for done, name in enumerate(trial.order):
            held, near = trial.held(name), _neighbours(saved[name], fronts[name], chosen[name])
            losses = {i: present if i == chosen[name] else trial.loss(name, options[name][i]) for i in near}
            trial.put_back(name, held)
            items.append([(losses[i] - present, saved[name][i], i) for i in near])
            context.progress("neighbouring formats", done + 1, len(trial.order))
        picked = choose_options([[(loss, gain) for loss, gain, _ in item] for item in items], amount)
        other = {name: item[k][2] for name, item, k in zip(trial.order, items, picked)}
        if other == chosen:
            break
        found = _error_of(trial, options, other)
        told.append(found)
        if found >= present:
            break
        chosen, present = other, found
    shown = ", ".join(f"{loss:.3g}" for loss in told)
    recorder.notes.append(f"Error of the outputs with all layers in their formats, by round: {shown}.")
    return chosen


def _error_of(trial: FormatTrial, options: Mapping[str, Sequence[Scheme | None]], chosen: Mapping[str, int]) -> float:
    """Of the trial with all layers in their formats, in which they stay."""
    for name in trial.order:
        trial.put(name, options[name][chosen[name]])
    return trial.error()


def _front(losses: Sequence[float], saved: Sequence[float]) -> list[int]:
    """The options that no other beats: less loss and as many bytes saved, or more bytes and no more loss."""
    ranks = [(losses[i], -saved[i], i) for i in range(len(losses))]
    return [
        i
        for i in range(len(losses))
        if not any(losses[j] <= losses[i] and saved[j] >= saved[i] and ranks[j] < ranks[i] for j in range(len(losses)))
    ]


def _neighbours(saved: Sequence[float], front: Sequence[int], index: int) -> list[int]:
    """The option itself, and those of the front that save the next more and the next less."""
    order = sorted(front, key=saved.__getitem__)
    place = order.index(index)
    return order[max(place - 1, 0) : place + 2]


def _bytes_saved(names: Sequence[str], model: nn.Module, scheme: Scheme | None, encoder: Encoder) -> float:
    """Bytes of the float weight of these layers less those of its codes, its scales and the grids of what they read."""
    if scheme is None:
        return 0.0
    layer: Any = model.get_submodule(names[0])
    if isinstance(layer, nn.RNNBase):
        return sum(weight.nbytes - scheme.weight.size_bytes(weight.shape) for weight in matrices(layer).values())
    grids = 0
    for name in names:
        stats = encoder.stats.get(name)
        if stats is not None and scheme.input is not None and not is_dynamic(scheme.input):
            grids += (stats.input is not None) + (name in encoder.outputs and stats.output is not None)
    size = format_for(layer, scheme.weight).size_bytes(layer.weight.shape)
    return float(layer.weight.nbytes - size - 8 * grids)
