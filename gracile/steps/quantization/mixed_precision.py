"""The number format of each layer, so that the model fits into its bytes and its outputs change least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gracile.context import Context
from gracile.errors import ConfigError, DataError
from gracile.evaluate.size import state_bytes
from gracile.formats import Scheme
from gracile.goal import Bytes
from gracile.graph import Trace
from gracile.knapsack import choose_options
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.solvers import RoundingSolver
from gracile.stats.match import divergence
from gracile.stats.moments import CannotRefitError, LayerMoments
from gracile.stats.replay import Replay
from gracile.steps.correct import copy_model
from gracile.steps.pruning.blocks import put_module
from gracile.steps.pruning.sequence import targets_of
from gracile.steps.pruning.tables import outputs_of, some_batches
from gracile.steps.quantization.grids import grid_of
from gracile.steps.quantization.quantize_layers import Encoder, format_for
from gracile.steps.quantization.round_layers import round_layer, solvable

#: Calibration examples that each layer's options are judged on.
EXAMPLES = 256


def choose_schemes(
    model: nn.Module,
    traced: Trace,
    options: Mapping[str, Sequence[Scheme]],
    budget: Bytes,
    encoder: Encoder,
    solver: RoundingSolver | None,
    context: Context,
    recorder: Recorder,
) -> dict[str, Scheme]:
    """argmin Σ loss of the layers' schemes subject to the bytes of the model, one scheme of each layer.

    The loss of a scheme is the divergence of the model's outputs from the original's with that layer alone quantized,
    by the solver where there is one, measured on calibration batches. Bytes are those of the model's tensors as stored.
    Raises ConfigError where no choice fits, with the least that can be reached.

    model: the float model, which is left as it is. traced: of it.
    """
    whole, original = state_bytes(model), state_bytes(context.original)
    limit = budget.limit(original)
    saved = {
        name: [_bytes_saved(name, model.get_submodule(name), scheme, encoder) for scheme in schemes]
        for name, schemes in options.items()
    }
    least = whole - sum(max(each) for each in saved.values())
    if least > limit:
        raise ConfigError(
            f"Quantize(to={budget}): cannot be met; the nearest that these options reach is {least:g} of {original:g} "
            f"bytes ({least / original:.3f}).\n  Ask for at least that, or add an option of fewer bits."
        )
    losses = measure_losses(model, traced, options, encoder, solver, context)
    items = [list(zip(losses[name], saved[name], strict=True)) for name in options]
    chosen = choose_options(items, whole - limit)
    recorder.numbers["predicted_loss"] = sum(item[i][0] for item, i in zip(items, chosen))
    recorder.numbers["bytes"] = whole - sum(item[i][1] for item, i in zip(items, chosen))
    found = {name: schemes[i] for (name, schemes), i in zip(options.items(), chosen)}
    names = dict.fromkeys(scheme.name for schemes in options.values() for scheme in schemes)
    counts = {name: sum(scheme.name == name for scheme in found.values()) for name in names}
    shares = ", ".join(f"{count} layers in {name}" for name, count in counts.items())
    recorder.notes.append(f"Mixed precision for {budget}: {shares}; chosen by the measured divergence of the outputs.")
    return found


def measure_losses(
    model: nn.Module,
    traced: Trace,
    options: Mapping[str, Sequence[Scheme]],
    encoder: Encoder,
    solver: RoundingSolver | None,
    context: Context,
) -> dict[str, list[float]]:
    """Layer -> the divergence of the outputs by each of its schemes, all other layers as they are."""
    batches = some_batches(context.data, EXAMPLES)
    trial = copy_model(model).eval()
    expected = outputs_of(trial, context.data, batches)
    place = {layer.name: i for i, layer in enumerate(traced.layers)}
    order = sorted(options, key=lambda name: place.get(name, len(place)))
    solved = solvable(model, traced, order) if solver is not None else {}
    names = [name for name in order if solved.get(name, "") is None]
    moments = LayerMoments(trial, targets_of(model, traced, names, context), norms=dict(traced.batch_norm_pairs()))
    replay = Replay(trial, context.data, batches)
    losses: dict[str, list[float]] = {}
    with eval_mode(model):
        for done, name in enumerate(order):
            old = trial.get_submodule(name)
            losses[name] = []
            for scheme in options[name]:
                layer, _ = encoder.build(name, old, scheme, encoder.encode(name, old, scheme))
                put_module(trial, name, layer.eval())
                if solver is not None and name in names and grid_of(layer.weight_format, encoder.ranges) is not None:
                    try:
                        round_layer(moments, name, encoder.weight(name, old), solver, encoder.ranges)
                    except CannotRefitError:
                        names.remove(name)
                replay.seek(name)
                losses[name].append(divergence(replay.outputs(), expected))
                if not math.isfinite(losses[name][-1]):
                    raise DataError(f"Quantize: the outputs are NaN or infinite with '{name}' in {scheme.name}.")
            put_module(trial, name, old)
            if name in moments.norms:  # which may have taken up what a layer without a bias could not
                norm = trial.get_submodule(moments.norms[name])
                norm.load_state_dict(model.get_submodule(moments.norms[name]).state_dict())
            context.progress("sensitivity", done + 1, len(order))
    return losses


def _bytes_saved(name: str, layer: nn.Module, scheme: Scheme, encoder: Encoder) -> float:
    """Bytes of the layer's float weight less those of its codes, its scales and the grids of its input and output."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    stats, grids = encoder.stats.get(name), 0
    if stats is not None and scheme.input is not None:
        grids = (stats.input is not None) + (name in encoder.outputs and stats.output is not None)
    return weight.nbytes - format_for(layer, scheme.weight).size_bytes(weight.shape) - 8 * grids
