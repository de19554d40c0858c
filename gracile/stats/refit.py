"""Layers refitted one after another to what they computed in the original, on the inputs they now receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data
from gracile.solvers import LeastSquares, Moments
from gracile.stats.collect import unfold_input, unfoldable

#: Tokens or positions behind the moments of one layer; neighbouring positions of an image say nearly the same.
ROWS = 65536


def refittable(module: nn.Module) -> bool:
    """Whether inputs unfold into rows for one weight matrix: linear layers, ungrouped 1-d and 2-d convolutions."""
    return unfoldable(module) and getattr(module, "groups", 1) == 1


def refit(
    model: nn.Module,
    original: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    data: Data,
    kept: Mapping[str, Tensor],
    solver: LeastSquares,
    *,
    normalised: set[str],
    generator: torch.Generator,
    on_layer: Callable[[int], None] | None = None,
) -> None:
    """Refit the named layers of the model in place, in the order given, each on inputs that earlier refits produce.

    layers: refittable layers in the order in which the model calls them, each once. batches: calibration batches; both
    models run in eval mode. kept: layer -> indices of the original's outputs that the layer still has; all where not
    named. normalised: layers behind which a batch norm takes out a shifted mean, so that a missing bias is no loss.
    """
    for done, name in enumerate(layers):
        layer: Any = model.get_submodule(name)
        moments = _moments(model, original, name, batches, data, generator)
        weight = original.get_submodule(name).weight.detach().flatten(1)  # type: ignore[operator,union-attr]
        if name in kept:
            weight = weight[kept[name].to(weight.device)]
        centre = layer.bias is not None or name in normalised
        solved, shift = solver(weight.cpu(), layer.weight.detach().flatten(1).cpu(), moments, centre)
        with torch.no_grad():
            zeros = layer.weight == 0
            layer.weight.copy_(solved.reshape(layer.weight.shape)).masked_fill_(zeros, 0.0)
            if layer.bias is not None and not bool(zeros.any()):
                bias = original.get_submodule(name).bias.detach()  # type: ignore[operator,union-attr]
                bias = bias[kept[name].to(bias.device)] if name in kept else bias
                layer.bias.copy_(bias.double().cpu() + shift)
        if on_layer is not None:
            on_layer(done + 1)


class _Reached(BaseException):
    """Raised by a hook once the input wanted is there: the rest of the forward is not needed.

    No `Exception`, so that neither the model's own handlers nor ours take it for a failure.
    """


def _input_of(model: nn.Module, name: str, batch: Batch, data: Data) -> Tensor:
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        data.forward(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _moments(
    model: nn.Module, original: nn.Module, name: str, batches: Sequence[Batch], data: Data, generator: torch.Generator
) -> Moments:
    sums: list[Tensor] = []
    count = 0
    with torch.no_grad():
        for batch in batches:
            x0 = unfold_input(original.get_submodule(name), _input_of(original, name, batch, data))[0]
            x = unfold_input(model.get_submodule(name), _input_of(model, name, batch, data))[0]
            wanted = max(1, ROWS // len(batches))
            if len(x) > wanted:
                chosen = torch.randint(len(x), (wanted,), generator=generator).to(x.device)
                x0, x = x0[chosen], x[chosen]
            parts = [x.T @ x, x0.T @ x, x.sum(0), x0.sum(0)]
            parts = [part.double().cpu() for part in parts]
            sums = [a + b for a, b in zip(sums, parts)] if sums else parts
            count += len(x)
    gram, cross, mean, mean_original = (total / count for total in sums)
    return Moments((gram + gram.T) / 2, cross, mean, mean_original)
