"""Layers refitted one after another to what they computed in the original, on the inputs they now receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data
from gracile.solvers import LeastSquares, Moments
from gracile.stats.collect import unfold_input, unfoldable
from gracile.stats.sums import read_layer, watch_blocks

#: Tokens or positions behind the moments of one layer; neighbouring positions of an image say nearly the same.
ROWS = 65536
#: Of the largest scale of a batch norm: channels below it pass on next to nothing, and cannot make good an error.
SMALL_SCALE = 1e-2


def refittable(module: nn.Module) -> bool:
    """Whether inputs unfold into rows for one weight matrix: linear layers, ungrouped 1-d and 2-d convolutions."""
    return unfoldable(module) and getattr(module, "groups", 1) == 1


@dataclass
class Refit:
    """Refits layers of a compressed model in place, each to the original's outputs on the inputs that it now gets.

    batches: calibration batches; both models run in eval mode. kept: layer -> indices of the original's outputs that
    the layer still has; all where not named. norms: layer -> the batch norm that alone reads its output, which takes
    up a shifted mean where the layer has no bias. summed: layers whose output is added to a stream; their target also
    carries the error of that stream. absorbed: such layers, without a batch norm -> blocks of the original that the
    model lacks behind it, and whose change of the stream it is to make too.
    """

    model: nn.Module
    original: nn.Module
    batches: Sequence[Batch]
    data: Data
    solver: LeastSquares
    generator: torch.Generator
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    summed: frozenset[str] = frozenset()
    absorbed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def centred(self, name: str) -> bool:
        """Whether the layer's outputs may shift by a constant, so that second moments are about the mean."""
        return self.model.get_submodule(name).bias is not None or name in self.norms

    @torch.no_grad()
    def measure(self, name: str) -> Moments:
        """Moments of the layer's inputs over at most ROWS rows, drawn alike from both models."""
        sums: list[Tensor] = []
        count = 0
        wanted = max(1, ROWS // len(self.batches))
        with_sum = self.norms.get(name, name) if name in self.summed else None
        for batch in self.batches:

            def run(model: nn.Module, batch: Batch = batch) -> Any:
                return self.data.forward(model, batch)

            input0, stream0 = read_layer(self.original, name, run, with_sum)
            input1, stream = read_layer(self.model, name, run, with_sum)
            x0 = unfold_input(self.original.get_submodule(name), input0)[0]
            x = unfold_input(self.model.get_submodule(name), input1)[0]
            delta = self._error(name, stream0, stream)
            if delta is not None and name in self.absorbed:
                for entered, left in watch_blocks(self.original, self.absorbed[name], run).values():
                    delta = delta + (left - entered).movedim(self._channel(name), -1).flatten(0, -2)
            if len(x) > wanted:
                chosen = torch.randint(len(x), (wanted,), generator=self.generator).to(x.device)
                x0, x, delta = x0[chosen], x[chosen], None if delta is None else delta[chosen]
            parts = [x.T @ x, x0.T @ x, x.sum(0), x0.sum(0)]
            if delta is not None:
                parts += [delta.T @ x, delta.sum(0)]
            parts = [part.double().cpu() for part in parts]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            count += len(x)
        gram, *others = (total / count for total in sums)
        return Moments((gram + gram.T) / 2, *others)

    @torch.no_grad()
    def solve(self, name: str, moments: Moments, columns: Tensor | None = None) -> None:
        """Set the layer to its least-squares weight; with columns, of those inputs only, and zero on the others."""
        layer: Any = self.model.get_submodule(name)
        source: Any = self.original.get_submodule(name)
        rows = self.kept.get(name, torch.arange(len(source.weight))).to(source.weight.device)
        weight, prior = source.weight[rows].flatten(1).cpu(), layer.weight.flatten(1).cpu()
        if columns is not None:
            moments, prior = moments.keep(columns), weight[:, columns]
        solved, shift = self.solver(weight, prior, moments, self.centred(name))
        if columns is not None:
            solved = torch.zeros(weight.shape, dtype=solved.dtype).index_copy(1, columns, solved)
        zeros = (layer.weight == 0) if columns is None else torch.zeros_like(layer.weight, dtype=torch.bool)
        layer.weight.copy_(solved.reshape(layer.weight.shape)).masked_fill_(zeros, 0.0)
        if bool(zeros.any()):  # the intercept was solved for weights that do not stay
            return
        if layer.bias is not None:
            layer.bias.copy_(source.bias[rows].double().cpu() + shift)
        elif name in self.norms:
            norm: Any = self.model.get_submodule(self.norms[name])
            norm0: Any = self.original.get_submodule(self.norms[name])
            if norm.running_mean is not None:  # without, it takes out the mean of the batch by itself
                norm.running_mean.copy_(norm0.running_mean[rows].double().cpu() - shift)

    def _channel(self, name: str) -> int:
        return 1 if "Conv" in type(self.model.get_submodule(name)).__name__ else -1

    def _error(self, name: str, stream0: Tensor | None, stream: Tensor | None) -> Tensor | None:
        """[rows, out]: error of the stream in the units of the layer's output, the batch norm behind it undone."""
        if stream0 is None or stream is None:
            return None
        channel = self._channel(name)
        stream0, stream = (t.movedim(channel, -1).flatten(0, -2) for t in (stream0, stream))
        if name in self.kept:
            stream0 = stream0[:, self.kept[name].to(stream0.device)]
        delta = stream0 - stream
        if name not in self.norms:
            return delta
        norm: Any = self.model.get_submodule(self.norms[name])
        if norm.running_var is None:
            return None
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        able = gain.abs() > SMALL_SCALE * gain.abs().max()
        scale = (norm.running_var + norm.eps).sqrt() / torch.where(able, gain, torch.ones_like(gain))
        return delta * torch.where(able, scale, torch.zeros_like(scale))


def refit(repair: Refit, layers: Sequence[str], *, on_layer: Callable[[int], None] | None = None) -> None:
    """Refit the named layers in the order given, each on inputs that earlier refits produce.

    layers: refittable layers in the order in which the model calls them, each once.
    """
    for done, name in enumerate(layers):
        repair.solve(name, repair.measure(name))
        if on_layer is not None:
            on_layer(done + 1)
