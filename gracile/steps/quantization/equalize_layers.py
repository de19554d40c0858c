"""Which layers are equalized with which, and how the factors go into their weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.equalize import CrossLayer
from gracile.graph import Trace
from gracile.recipe import Recorder, Step
from gracile.report.model import LayerRow
from gracile.stats.match import output_error, split_batches
from gracile.stats.rows import CONVOLUTIONS
from gracile.steps.correct import copy_model


@torch.no_grad()
def equalize_layers(model: nn.Module, layers: Collection[str], traced: Trace, settings: CrossLayer) -> list[str]:
    """Equalize pairs of these layers in place; the model computes the same. Returns the names of those it changed."""
    calls = {layer.name: layer.calls for layer in traced.layers}
    pairs = [
        (model.get_submodule(first), model.get_submodule(second), first, second)
        for first, second in traced.homogeneous_pairs()
        if first in layers and second in layers and calls[first] == calls[second] == 1
    ]
    pairs = [pair for pair in pairs if _fit(pair[0], pair[1])]
    for _ in range(settings.sweeps):
        largest = 0.0
        for first, second, *_ in pairs:
            factors = settings.factors(_made(first.weight), _read(second))  # type: ignore[arg-type]
            _scale(first, second, factors)
            largest = max(largest, float((factors - 1).abs().max()))
        if largest <= settings.tolerance:
            break
    return [name for pair in pairs for name in pair[2:]]


def _fit(first: Any, second: Any) -> bool:
    """Whether channels of the first are channels of the second, one to one, and factors can go into both."""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.out_features == second.in_features
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not (
        isinstance(first, plain) and isinstance(second, plain) and len(first.kernel_size) == len(second.kernel_size)
    ):
        return False
    return second.groups in (1, second.in_channels) and second.padding_mode == "zeros"


def _made(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _read(layer: Any) -> Tensor:
    """[channels, weights that read each]."""
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        return layer.weight.reshape(layer.in_channels, -1)
    weight: Tensor = layer.weight
    return weight.transpose(0, 1).flatten(1)


def _scale(first: Any, second: Any, factors: Tensor) -> None:
    dividing = factors.reshape(-1, *[1] * (first.weight.ndim - 1))
    first.weight.copy_(first.weight.double() / dividing)
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / factors)
    shape = [1] * second.weight.ndim
    if isinstance(second, CONVOLUTIONS) and second.groups > 1:
        shape[0] = -1
        factors = factors.repeat_interleave(second.out_channels // second.in_channels)
    else:
        shape[1] = -1
    second.weight.copy_(second.weight.double() * factors.reshape(shape))


def equalize_where_better(
    model: nn.Module,
    layers: Sequence[str],
    traced: Trace,
    equalize: CrossLayer,
    quantize: Step,
    context: Context,
    recorder: Recorder,
) -> None:
    """Cross-layer equalization in place, if the quantized model is nearer to the original with it than without.

    quantize: the step that both are judged by, on held-out batches.
    """
    equalized = copy_model(model)
    changed = equalize_layers(equalized, layers, traced, equalize)
    if not changed:
        recorder.notes.append("CrossLayer: no two layers follow each other with only ReLU or pooling between them.")
        return
    held_out = split_batches(context.data)[1]
    errors = []
    for net in (model, equalized):
        trial = copy_model(net)
        quantize(trial, context)
        errors.append(output_error(trial, model, context.data, held_out))
    kept = errors[1] < errors[0]
    if kept:
        for name in set(changed):
            model.get_submodule(name)._parameters.update(equalized.get_submodule(name)._parameters)
        kinds = {name: type(model.get_submodule(name)).__name__ for name in changed}
        recorder.layers.extend(LayerRow(name=n, kind=kind, action="equalized") for n, kind in kinds.items())
    recorder.notes.append(
        f"CrossLayer equalization of {len(set(changed))} layers {'was kept' if kept else 'was taken back'}: output "
        f"error on held-out batches {errors[1]:.3g} with it, {errors[0]:.3g} without."
    )
