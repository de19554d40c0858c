"""Layers that hold one weight, as an embedding and the output layer of a language model: they take one format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from gracile.nn import QuantizedLayer, quantized_kind
from gracile.recipe import Recorder

#: Layers whose weights have the same rows, and so the same codes.
TOGETHER = (nn.Linear, nn.Embedding)


def why_apart(model: nn.Module, name: str, group: Sequence[str], selected: Collection[str]) -> str | None:
    """Why this layer of a group cannot be quantized together with the others; None where it can."""
    others = [other for other in group if other != name]
    for other in others:
        if not _fits(model.get_submodule(other)):
            return f"shares its weight with '{other}', a {type(model.get_submodule(other)).__name__}"
        if other not in selected:
            return f"shares its weight with '{other}', which is not selected"
    if not _fits(model.get_submodule(name)):
        return f"shares its weight with '{others[0]}'; only linear layers and embeddings are quantized together"
    return None


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, TOGETHER) and quantized_kind(layer) is not None


def tie(model: nn.Module, groups: Sequence[Sequence[str]], recorder: Recorder) -> None:
    """Let the quantized layers of each group hold the codes and scales of its first, which equal theirs."""
    for first, *others in groups:
        source = model.get_submodule(first)
        for name in others:
            layer = model.get_submodule(name)
            if isinstance(source, QuantizedLayer) and isinstance(layer, QuantizedLayer):
                layer.hold_weight_of(source)
                rows = enumerate(recorder.layers)
                i = next(i for i, row in rows if row.name == name and row.action == "quantized")
                recorder.layers[i] = replace(recorder.layers[i], reason=f"one weight with '{first}'")
