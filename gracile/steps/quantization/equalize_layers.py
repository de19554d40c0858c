"""Which layers are equalized with which, and how the factors go into their weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from gracile.equalize import CrossLayer
from gracile.graph import Trace
from gracile.stats.rows import CONVOLUTIONS


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
