"""The layers that a number format can be put on, and the quantized layer that takes the place of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.formats import Format, Int, Levels, MidRise, PerChannel, Scheme, format_title, format_to_config, is_dynamic
from gracile.graph import Trace
from gracile.layer_stats import LayerStats
from gracile.nn import (
    EncodedWeight,
    QuantizedLayer,
    QuantizedRecurrent,
    quantize_layer,
    quantized_kind,
    recurrent_kind,
)
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.select import Select
from gracile.sharing import tied_groups
from gracile.stats.rows import CONVOLUTIONS
from gracile.steps.quantization.grids import nearest_codes
from gracile.steps.quantization.tied import why_apart
from gracile.surgery import Swap, apply

#: What the report says of layers other than linear ones where scales of inputs are found token by token.
WEIGHTS_ONLY = "weights only: its inputs have no tokens"

#: Operators between a convolution and the next quantized layer that integer kernels take into the convolution.
ABSORBED = frozenset({"relu", "hardtanh", "clamp", "relu6"})


def quantizable(
    model: nn.Module, exclude: tuple[str, ...], context: Context, recorder: Recorder
) -> tuple[list[str], list[str]]:
    """Names of the selected layers for which there is a quantized one, and of the recurrent ones among the selected.

    Others are recorded with the reason.
    """
    select = (context.select or Select()).without(*exclude)
    weighted = [
        (name, m)
        for name, m in model.named_modules()
        if not isinstance(m, EncodedWeight)
        and (
            isinstance(m, (QuantizedLayer, QuantizedRecurrent)) or any(p.ndim >= 2 for p in m.parameters(recurse=False))
        )
    ]
    Select(exclude=exclude).check([name for name, _ in weighted])
    tied = {name: group for group in tied_groups(model, "weight") for name in group}
    selected = [name for name, _ in weighted if select.matches(name)]
    chosen, recurrent = [], []
    for name, module in weighted:
        if not select.matches(name):
            continue
        apart = why_apart(model, name, tied[name], selected) if name in tied else None
        if isinstance(module, (QuantizedLayer, QuantizedRecurrent)):
            recorder.skip(name, type(module).__name__, "quantized already")
        elif name and recurrent_kind(module) is not None:
            recurrent.append(name)
        elif quantized_kind(module) is None:
            recorder.skip(name, type(module).__name__, f"no quantized layer stands for a {type(module).__name__}")
        elif not name:
            recorder.skip("model", type(module).__name__, "the model is itself a layer; wrap it: nn.Sequential(model)")
        elif apart is not None:
            recorder.skip(name, type(module).__name__, apart)
        else:
            chosen.append(name)
    if not chosen and not recurrent:
        reasons = [f"{row.name}: {row.reason}" for row in recorder.layers[:5]]
        raise NothingChangedError(
            "Quantize: no layer can be quantized.\n  " + ("\n  ".join(reasons) or "The selection holds none.")
        )
    return chosen, recurrent


@dataclass
class Encoder:
    """Puts layers on the grids of a scheme.

    ranges: how scales are found. stats: layer -> histograms of its input and output; none where inputs stay float.
    outputs: layers whose output needs a grid too. smoothing: layer -> what its inputs are divided by, and its weight
    multiplied. folded: layer -> ε of the batch norm that was folded into it. chosen: what finds the scale of a layer's
    input of some format, where that is not `ranges`.
    """

    ranges: Range
    stats: Mapping[str, LayerStats] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)
    folded: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[tuple[str, Int], Range] = field(default_factory=dict)

    def weight(self, name: str, layer: nn.Module) -> Tensor:
        """The float weight that the codes of the layer stand for."""
        weight: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr,assignment]
        return weight * self.smoothing[name] if name in self.smoothing else weight

    def check(self, name: str, layer: nn.Module, scheme: Scheme) -> None:
        """Raise what `encode` would raise."""
        fmt = format_for(layer, scheme.weight)
        if not isinstance(fmt, Int) or not torch.isfinite(self.weight(name, layer)).all():
            self.encode(name, layer, scheme)
        else:
            self._sized(name, layer, fmt)

    def encode(self, name: str, layer: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
        """The weight by its nearest codes. Raises DataError or ConfigError, naming the layer, where it has none."""
        weight = self.weight(name, layer)
        if not torch.isfinite(weight).all():
            raise DataError(f"Quantize: the weight of layer '{name}' holds NaN or infinity.")
        fmt = format_for(layer, scheme.weight)
        self._sized(name, layer, fmt)
        check_zeros(name, weight, fmt)
        try:
            return nearest_codes(weight, fmt, self.ranges)
        except ConfigError as error:  # values that the format does not reach
            raise ConfigError(f"Quantize: layer '{name}' {tuple(weight.shape)}: {error}") from error

    def _sized(self, name: str, layer: Any, fmt: Format) -> None:
        """Refuse a granularity that does not fit the weight."""
        try:
            fmt.size_bytes(layer.weight.shape)
        except ConfigError as error:
            raise ConfigError(f"Quantize: layer '{name}' {tuple(layer.weight.shape)}: {error}") from error

    def build(
        self, name: str, old: Any, scheme: Scheme, encoded: Mapping[str, Tensor]
    ) -> tuple[QuantizedLayer, dict[str, Any]]:
        """The quantized layer for an old one, and its configuration."""
        fmt = format_for(old, scheme.weight)
        config: dict[str, Any] = {"weight": format_to_config(fmt), "input": None, "output": None}
        tensors = {f"weight_{key}": value for key, value in encoded.items() if key != "shape"}
        stats = self.stats.get(name)
        if is_dynamic(scheme.input):
            config["input"] = format_to_config(scheme.input) if isinstance(old, nn.Linear) else None
        elif stats is not None and isinstance(scheme.input, Int):
            sides = {"input": (stats.input, scheme.input)}
            if name in self.outputs:  # read by a sum or the like, which no kernel computes in fewer bits
                sides["output"] = (stats.output, replace(scheme.input, bits=8))
            for side, (histogram, grid) in sides.items():
                if histogram is not None:
                    ranges = self.chosen.get((name, grid), self.ranges) if side == "input" else self.ranges
                    scale, zero_point = ranges.activation(histogram, grid)
                    config[side] = format_to_config(grid)
                    tensors[f"{side}_scale"], tensors[f"{side}_zero_point"] = scale, zero_point
        if name in self.smoothing:
            config["smooth"] = True
            tensors["input_multiplier"] = 1 / self.smoothing[name]
        if has_zeros(old.weight):
            config["sparse"] = True
        if name in self.folded:
            config["batch_norm"] = self.folded[name]
        if isinstance(getattr(old, "bias", None), Tensor):
            config["bias"] = True
            tensors["bias"] = old.bias.detach()
        layer = quantize_layer(old, tensors, config)
        assert isinstance(layer, QuantizedLayer)
        return layer, config

    def swap(self, model: nn.Module, name: str, scheme: Scheme, recorder: Recorder) -> None:
        """Put the quantized layer in the old one's place, and record it."""
        old: Any = model.get_submodule(name)
        encoded = self.encode(name, old, scheme)
        layer, config = self.build(name, old, scheme, encoded)
        edit = Swap(name, type(layer).__name__, config)
        apply(model, [edit])
        new: Any = model.get_submodule(name)
        new.load_state_dict(layer.state_dict())
        new.train(old.training)
        recorder.edits.append(edit)
        weight = self.weight(name, old).float()
        decoded = format_for(old, scheme.weight).decode(encoded)
        error = (decoded - weight).square().sum() / weight.square().sum().clamp_min(1e-30)
        recorder.layers.append(
            LayerRow(
                name=name,
                kind=type(old).__name__,
                action="quantized",
                bits=8 * sum(t.nbytes for key, t in encoded.items() if key != "shape") / old.weight.numel(),
                sparsity=new.sparsity,
                format=_title(layer),
                **self._input_range(name, layer),
                error=float(error),
                reason=WEIGHTS_ONLY if is_dynamic(scheme.input) and layer.input_format is None else None,
            )
        )

    def _input_range(self, name: str, layer: QuantizedLayer) -> dict[str, Any]:
        """The range of a layer's inputs, and how much of what calibration saw lies beyond."""
        found, stats = layer.input_range, self.stats.get(name)
        if found is None or stats is None or stats.input is None:
            return {}
        return {"range": found, "clipped": stats.input.share_outside(*found)}


def _title(layer: QuantizedLayer) -> str:
    title = format_title(layer.weight_format)
    return title if layer.input_format is None else f"{title}, inputs {format_title(layer.input_format)}"


def layers_with_output_grids(model: nn.Module, layers: Collection[str], traced: Trace) -> frozenset[str]:
    """Of the layers with inputs on a grid those whose output needs one of its own, since none of them follows directly.

    That is so where a sum or the like reads it, or where behind an activation only operators do, such as a pooling, or
    layers in floating point: without a grid the convolution would run in floating point. Linear layers need none: their
    kernels give float outputs from integer products.
    """
    readers = {f"module:{name}" for name in layers}

    def needs(name: str) -> bool:
        if not all(c in ABSORBED or c.startswith("module:") for c in traced.consumers(name)):
            return True
        behind = traced.consumers_behind(name, ABSORBED)
        return bool(behind) and not readers.intersection(behind)

    convolutions = [name for name in layers if isinstance(model.get_submodule(name), CONVOLUTIONS)]
    return frozenset(name for name in convolutions if needs(name))


def with_output_grids(
    encoder: Encoder, model: nn.Module, schemes: Mapping[str, Scheme | None], traced: Trace
) -> Encoder:
    """The encoder with output grids for layers in these schemes; None: a layer stays in floating point."""
    on_grids = [
        name for name, scheme in schemes.items() if scheme is not None and scheme.input and not is_dynamic(scheme.input)
    ]
    return replace(encoder, outputs=layers_with_output_grids(model, on_grids, traced))


def has_zeros(weight: Tensor) -> bool:
    """Whether single weights were pruned: zeros in rows that hold others too, not a row of padding or a dead unit."""
    zero = weight.detach().flatten(1) == 0
    return bool((zero.any(1) & ~zero.all(1)).any())


def check_zeros(name: str, weight: Tensor, fmt: Format) -> None:
    """Refuse a format without a zero for a weight of which single values were pruned."""
    if isinstance(fmt, Levels) and 0.0 not in fmt.levels and has_zeros(weight):
        raise ConfigError(
            f"Quantize: layer '{name}' {tuple(weight.shape)} was pruned, and {type(fmt).__name__} has no zero.\n"
            f"  Use Ternary() for it, or exclude it."
        )


def format_for(layer: nn.Module, fmt: Format) -> Format:
    """The scheme's format, with channels along the output axis of a transposed convolution."""
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    if transposed and isinstance(fmt, (Int, MidRise)) and fmt.granularity == PerChannel(0):
        return replace(fmt, granularity=PerChannel(1))
    return fmt
