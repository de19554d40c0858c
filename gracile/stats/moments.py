"""Moments of layers in a compressed model, beside what each of them gave in the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gracile.nn import QuantizedLayer
from gracile.solvers import Moments
from gracile.stats.norms import has_factors, normalised
from gracile.stats.replay import Replay
from gracile.stats.rows import count_rows, input_rows, rows_at
from gracile.stats.sums import read_inputs, read_layer
from gracile.stats.targets import Targets

#: Of the largest scale of a batch norm: channels below it pass on next to nothing, and cannot make good an error.
SMALL_SCALE = 1e-2


class CannotRefitError(Exception):
    """A layer sees other tokens in the compressed model than in the original; its text says which and how many."""


@dataclass
class LayerMoments:
    """Second moments of the present inputs of a model's layers, with what they should make of these.

    targets: of the original, which like the model is in eval mode. kept: layer -> indices of the original's outputs
    that the layer still has; all where not named. norms: layer -> the batch norm that alone reads its output, which
    takes up a shifted mean where the layer has no bias. Where the output is added to a stream (`targets.sums`), the
    target also carries the error of that stream. Inputs of quantized layers count as their grid leaves them, and those
    of grouped convolutions by group: the moments then have an axis of groups in front. The inputs of a normalisation's
    factors are what they multiply, by channel.
    """

    model: nn.Module
    targets: Targets
    kept: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    norms: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.replay = Replay(self.model, self.targets.data, self.targets.batches)

    def centred(self, name: str) -> bool:
        """Whether the layer's outputs may shift by a constant, so that second moments are about the mean."""
        return getattr(self.model.get_submodule(name), "bias", None) is not None or name in self.norms

    @torch.no_grad()
    def measure(self, name: str) -> Moments:
        """Moments of the layer's present inputs and of what it should make of them, at the targets' rows.

        The model must not change any more before the layer: forwards start there from now on.
        Raises CannotRefitError where the layer gets another number of tokens than in the original (a router's choice).
        """
        target, layer = self.targets.of(name), self.model.get_submodule(name)
        self.replay.seek(name)
        total = Sums()
        summed = self.targets.sums.get(name) if target.streams else None
        for i in range(len(self.targets.batches)):
            x, stream = read_layer(self.model, name, partial(self._run, i), summed)
            wanted = self._rows(name, target.outputs[i])
            if stream is not None:
                stream0 = self._rows(name, target.streams[i])
                wanted = wanted + self._gain(name, stream0 - rows_at(layer, stream, target.chosen[i]))
            if has_factors(layer):
                inputs, offset = self._normalised(name, x, i)
                wanted = wanted - offset
            else:
                inputs = self._inputs(name, x, i)
            total.add(self._by_group(layer, inputs), self._by_group(layer, wanted))
        return total.moments()

    @torch.no_grad()
    def measure_inputs(self, names: Iterable[str]) -> dict[str, Moments]:
        """Moments of several layers, without the error of a stream; in one forward of each batch if targets of all are
        held together."""
        totals = {name: Sums() for name in names}
        left = list(totals)
        while left:
            part = self.targets.held_with(left)
            left = [name for name in left if name not in part]
            for i in range(len(self.targets.batches)):
                inputs = read_inputs(self.model, part, partial(self._run, i))
                for name in part:
                    outputs = self.targets.of(name).outputs[i]
                    rows = self._by_group(self.model.get_submodule(name), self._inputs(name, inputs[name], i))
                    totals[name].add(rows, self._rows(name, outputs))
        return {name: total.moments() for name, total in totals.items()}

    @torch.no_grad()
    def shift(self, name: str, shift: Tensor) -> None:
        """Add to the original's bias, [out] of those kept, or have the batch norm behind a layer without one do so."""
        layer: Any = self.model.get_submodule(name)
        source: Any = self.targets.original.get_submodule(name)
        rows = self.kept.get(name, slice(None))
        if layer.bias is not None:
            bias = 0.0 if source.bias is None else source.bias[rows].double().cpu()
            layer.bias.copy_(bias + shift)
        elif name in self.norms:
            norm: Any = self.model.get_submodule(self.norms[name])
            norm0: Any = self.targets.original.get_submodule(self.norms[name])
            if norm.running_mean is not None:  # without, it takes out the mean of the batch by itself
                norm.running_mean.copy_(norm0.running_mean[rows].double().cpu() - shift)

    def _run(self, index: int, model: nn.Module) -> Any:
        return self.replay.run(index)

    def _inputs(self, name: str, x: Tensor, batch: int) -> Tensor:
        layer, target = self.model.get_submodule(name), self.targets.of(name)
        self._check_count(name, count_rows(layer, x), batch)
        if isinstance(layer, QuantizedLayer):
            x = layer.on_input_grid(x)
        return input_rows(layer, x, target.chosen[batch])

    def _normalised(self, name: str, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Rows of what the factors of a normalisation multiply, and of what is added to that beside the bias."""
        layer, chosen = self.model.get_submodule(name), self.targets.of(name).chosen[batch]
        found = normalised(layer, x)
        if found is None:
            raise CannotRefitError(f"the output of {name} is not affine in a factor for each channel")
        self._check_count(name, found[0][..., 0].numel(), batch)
        n, offset = (rows_at(layer, part, chosen) for part in found)
        return n, offset

    def _check_count(self, name: str, count: int, batch: int) -> None:
        if count != (there := self.targets.of(name).counts[batch]):
            raise CannotRefitError(f"{name} reads {count} tokens, and {there} in the original")

    def _rows(self, name: str, y: Tensor) -> Tensor:
        """What is left of the original's outputs."""
        return y[:, self.kept[name].to(y.device)] if name in self.kept else y

    def _by_group(self, layer: Any, rows: Tensor) -> Tensor:
        """[n, columns of all groups] as [groups, n, columns of one]; as it is where there is one group.

        Each channel of a normalisation is a group.
        """
        groups: int = rows.shape[1] if has_factors(layer) else getattr(layer, "groups", 1)
        return rows if groups == 1 else rows.unflatten(1, (groups, -1)).movedim(1, 0)

    def _gain(self, name: str, delta: Tensor) -> Tensor:
        """The error of the stream in the units of the layer's output: the batch norm behind it undone."""
        if name not in self.norms:
            return delta
        norm: Any = self.model.get_submodule(self.norms[name])
        if norm.running_var is None:
            return torch.zeros_like(delta)
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        able = gain.abs() > SMALL_SCALE * gain.abs().max()
        scale = (norm.running_var + norm.eps).sqrt() / torch.where(able, gain, torch.ones_like(gain))
        return delta * torch.where(able, scale, torch.zeros_like(scale))


class Sums:
    """Running sums of x xᵀ, t xᵀ, x, t and t² over batches, x: [..., n, d] and t: [..., n, out]."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.count = 0

    def add(self, x: Tensor, t: Tensor) -> None:
        x, t = (a if a.dtype == torch.float64 else a.float() for a in (x, t))  # lower precision is none for sums
        parts = [part.double().cpu() for part in (x.mT @ x, t.mT @ x, x.sum(-2), t.sum(-2), t.square().sum(-2))]
        self.parts = [a + b for a, b in zip(self.parts, parts, strict=True)] if self.parts else parts
        self.count += x.shape[-2]

    def moments(self) -> Moments:
        gram, cross, mean, mean_target, square_target = (part / self.count for part in self.parts)
        return Moments((gram + gram.mT) / 2, cross, mean, mean_target, square_target)
