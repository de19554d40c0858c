"""Layers that can take up what a removed block added to the stream: the last ones before it whose output is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.graph import Block, Trace
from gracile.modes import eval_mode
from gracile.stats.refit import refittable
from gracile.stats.sums import read_layer, watch_blocks
from gracile.steps.pruning.consumers import tied_layers


def absorbing_layers(
    reference: nn.Module, traced: Trace, order: Sequence[str], gone: Sequence[Block], run: Callable[[nn.Module], Any]
) -> dict[str, tuple[str, ...]]:
    """Layer -> the removed blocks behind it, where the sum that its output enters is the first one's input as it is.

    reference: the model with the blocks. traced: of the model without. order: layers of the reference in the order of
    its forward. Streams that are normalised after the sum (post-norm) have no such layer. Blocks that follow on each
    other have one between them.
    """
    tied = tied_layers(reference)
    left = {layer.name for layer in traced.layers if layer.calls == 1} - tied
    behind: dict[str, list[str]] = {}
    for block in gone:
        inside = [i for i, name in enumerate(order) if name.startswith(f"{block.name}.")]
        before = [name for name in order[: inside[0]] if name in left and traced.feeds_sum(name)] if inside else []
        if before and refittable(reference.get_submodule(before[-1])):
            behind.setdefault(before[-1], []).append(block.name)
    with eval_mode(reference), torch.no_grad():
        streams = watch_blocks(reference, [block.name for block in gone], run)
        found = {}
        for layer, names in behind.items():
            names.sort(key=list(streams).index)
            chain, stream = [], _sum_behind(reference, layer, run)
            for name in names:
                entered, left_with = streams[name]
                if stream is None or stream.shape != entered.shape or not torch.allclose(stream, entered):
                    break
                chain.append(name)
                stream = left_with
            if chain:
                found[layer] = tuple(chain)
    return found


def _sum_behind(model: nn.Module, layer: str, run: Callable[[nn.Module], Any]) -> Tensor | None:
    """The layer's output and what it is added to; None where it is added to nothing as it is."""
    x, other = read_layer(model, layer, run, layer)
    return None if other is None else model.get_submodule(layer)(x) + other
