"""Recurrent layers with encoded weights in place of float ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import ConfigError, DataError
from gracile.formats import Format, Int, Scheme, format_title, format_to_config, is_dynamic
from gracile.nn import QuantizedRecurrent, build_layer, can_be_dynamic, recurrent_kind
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.steps.quantization.grids import nearest_codes
from gracile.steps.quantization.quantize_layers import Encoder, check_zeros, has_zeros
from gracile.surgery import Swap, apply

#: What the report says of recurrent layers.
STORED = "weights only: no runtime computes this layer in few bits"
STORED_LSTM = "weights only: ONNX Runtime computes LSTMs in integers with W8A8Dynamic or W7A8Dynamic"
DYNAMIC = "inputs and states take 8 bits as they come; in integers in ONNX Runtime, elsewhere in floating point"


def check_recurrent(model: nn.Module, layers: Sequence[str], formats: Iterable[Format]) -> None:
    """Refuse weights that cannot be encoded, before any change: DataError or ConfigError, naming the layer."""
    for name, fmt in product(layers, list(formats)):
        for key, weight in matrices(model.get_submodule(name)).items():
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"Quantize: the weight '{key}' of layer '{name}' holds NaN or infinity.")
            check_zeros(f"{name}.{key}", weight, fmt)
            try:
                fmt.size_bytes(weight.shape)
                if not isinstance(fmt, Int):
                    fmt.encode(weight)
            except ConfigError as error:
                raise ConfigError(f"Quantize: layer '{name}', {key} {tuple(weight.shape)}: {error}") from error


def in_integers(layer: nn.Module, scheme: Scheme) -> bool:
    """Whether a kernel with integer products takes the layer in this scheme: an LSTM whose inputs are rounded as they
    come."""
    fmt = scheme.weight
    return isinstance(fmt, Int) and fmt.scaled_by_output and is_dynamic(scheme.input) and can_be_dynamic(layer)


def build_recurrent(old: nn.Module, scheme: Scheme, ranges: Range) -> tuple[QuantizedRecurrent, dict[str, Any]]:
    """The quantized layer for a recurrent one, every weight at its nearest code, and its configuration."""
    fmt = scheme.weight
    sparse = [key for key, weight in matrices(old).items() if has_zeros(weight)]
    config: dict[str, Any] = {"weight": format_to_config(fmt)} | ({"sparse": sparse} if sparse else {})
    if in_integers(old, scheme):
        config["dynamic"] = True
    layer = build_layer(str(recurrent_kind(old)), config, old)
    assert isinstance(layer, QuantizedRecurrent)
    for key, weight in matrices(old).items():
        matrix: Any = layer.encoded[key]
        matrix.set_weight(nearest_codes(weight, fmt, ranges))
    return layer.train(old.training), config


def build_nearest(name: str, old: nn.Module, scheme: Scheme, encoder: Encoder) -> nn.Module:
    """What stands for a layer of either kind in the scheme, its weights at their nearest codes."""
    if isinstance(old, nn.RNNBase):
        return build_recurrent(old, scheme, encoder.ranges)[0]
    return encoder.build(name, old, scheme, encoder.encode(name, old, scheme))[0]


def quantize_recurrent(model: nn.Module, schemes: Mapping[str, Scheme], ranges: Range, recorder: Recorder) -> None:
    """Put layers with encoded matrices in the place of LSTMs, GRUs and RNNs; every weight goes to its nearest code."""
    for name, scheme in schemes.items():
        old = model.get_submodule(name)
        layer, config = build_recurrent(old, scheme, ranges)
        edit = Swap(name, str(recurrent_kind(old)), config)
        apply(model, [edit])
        model.get_submodule(name).load_state_dict(layer.state_dict())
        error = signal = nbytes = 0.0
        for key, weight in matrices(old).items():
            matrix: Any = layer.encoded[key]
            error += float((matrix.decoded_weight() - weight).square().sum())
            signal += float(weight.square().sum())
            nbytes += sum(t.nbytes for part, t in matrix.encoded_weight().items() if part != "shape")
        recorder.edits.append(edit)
        recorder.layers.append(
            LayerRow(
                name=name,
                kind=type(old).__name__,
                action="quantized",
                bits=8 * nbytes / sum(weight.numel() for weight in matrices(old).values()),
                format=format_title(scheme.weight)
                + (", inputs and states uint8 as they come" if layer.dynamic else ""),
                error=error / max(signal, 1e-30),
                reason=DYNAMIC if layer.dynamic else STORED_LSTM if can_be_dynamic(old) else STORED,
            )
        )


def matrices(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a recurrent layer that take a format, by their names."""
    return {name: p.detach() for name, p in layer.named_parameters(recurse=False) if p.ndim == 2}
