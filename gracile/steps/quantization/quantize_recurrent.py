"""Recurrent layers with encoded weights in place of float ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import ConfigError, DataError
from gracile.formats import Format, Int, format_title, format_to_config
from gracile.nn import EncodedWeight, recurrent_kind
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.steps.quantization.quantize_layers import has_zeros
from gracile.surgery import Swap, apply

#: What the report says of a recurrent layer.
STORED = "weights only: no runtime computes recurrent layers in few bits"


def check_recurrent(model: nn.Module, layers: Sequence[str], fmt: Format) -> None:
    """Refuse weights that cannot be encoded, before any change: DataError or ConfigError, naming the layer."""
    for name in layers:
        for key, weight in _matrices(model.get_submodule(name)).items():
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"Quantize: the weight '{key}' of layer '{name}' holds NaN or infinity.")
            try:
                fmt.size_bytes(weight.shape)
                if not isinstance(fmt, Int):
                    fmt.encode(weight)
            except ConfigError as error:
                raise ConfigError(f"Quantize: layer '{name}', {key} {tuple(weight.shape)}: {error}") from error


def quantize_recurrent(model: nn.Module, layers: Sequence[str], fmt: Format, ranges: Range, recorder: Recorder) -> None:
    """Put layers with encoded matrices in the place of LSTMs, GRUs and RNNs; every weight goes to its nearest code."""
    for name in layers:
        old = model.get_submodule(name)
        sparse = [key for key, weight in _matrices(old).items() if has_zeros(weight)]
        config = {"weight": format_to_config(fmt)} | ({"sparse": sparse} if sparse else {})
        edit = Swap(name, str(recurrent_kind(old)), config)
        apply(model, [edit])
        encoded: Any = model.get_submodule(name).encoded
        error = signal = nbytes = 0.0
        for key, weight in _matrices(old).items():
            matrix: EncodedWeight = encoded[key]
            tensors = fmt.encode(weight, ranges.weight(weight, fmt)) if isinstance(fmt, Int) else fmt.encode(weight)
            matrix.set_weight(tensors)
            error += float((matrix.decoded_weight() - weight).square().sum())
            signal += float(weight.square().sum())
            nbytes += sum(t.nbytes for part, t in tensors.items() if part != "shape")
        recorder.edits.append(edit)
        count = sum(weight.numel() for weight in _matrices(old).values())
        recorder.layers.append(
            LayerRow(
                name=name,
                kind=type(old).__name__,
                action="quantized",
                bits=8 * nbytes / count,
                format=format_title(fmt),
                error=error / max(signal, 1e-30),
                reason=STORED,
            )
        )


def _matrices(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters(recurse=False) if p.ndim == 2}
