"""One layer's output matched to what it was in the original, where the layers around it stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.modes import eval_mode
from gracile.stats.match import channel_rows, gain_to, has_biased_channels, has_gains
from gracile.stats.sums import Reached


@dataclass
class ChannelMoments:
    """Mean and variance of each channel, [channels] float64, over all rows that were added."""

    count: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """rows: [n, channels]."""
        rows = rows.detach().double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def variance(self) -> Tensor:
        return (torch.as_tensor(self.square) / self.count - self.mean.square()).clamp_min(0)


def output_moments(
    model: nn.Module, names: Iterable[str], runs: Iterable[Callable[[nn.Module], Any]], *, stop: bool = False
) -> Mapping[str, ChannelMoments]:
    """Layer -> moments of its output over some forwards, in eval mode; layers that give no tensor have none.

    stop: end each forward once every layer has run.
    """
    found = {name: ChannelMoments() for name in names}
    seen: set[str] = set()
    handles = []
    for name in found:

        def add(module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                found[name].add(channel_rows(module, output))
            seen.add(name)
            if stop and len(seen) == len(found):
                raise Reached

        handles.append(model.get_submodule(name).register_forward_hook(add))
    try:
        with eval_mode(model), torch.no_grad():
            for run in runs:
                seen.clear()
                with contextlib.suppress(Reached):
                    run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments for name, moments in found.items() if moments.count}


@torch.no_grad()
def match_layer(layer: nn.Module, present: ChannelMoments, wanted: ChannelMoments) -> None:
    """bias ← g (bias − mean of present) + mean wanted, where the layer has a bias; below 8 bits also scale ← g · scale.

    g = √(variance wanted / variance present) of layers whose scales are corrected, else 1: what `match_statistics` does
    to all layers of a model together. present: of the layer's output as it is.
    """
    if not has_biased_channels(layer):
        return
    module: Any = layer
    gain = torch.ones_like(present.mean)
    if has_gains(layer):
        gain = gain_to(present.variance, wanted.variance)
        module.weight_scale.mul_(gain.to(module.weight_scale.dtype).view(module.weight_scale.shape))
    module.bias.copy_(gain * (module.bias.double() - present.mean) + wanted.mean)
