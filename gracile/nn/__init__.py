"""Layers that compressed models are made of: plain modules with plain buffers, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gracile.errors import ArtifactError
from gracile.formats import is_dynamic
from gracile.nn.factorized import Factorized, FactorizedConv, FactorizedLinear, compose, factorized_kind
from gracile.nn.grid import begin_training, end_training, freeze_batch_norms, keep_sizes
from gracile.nn.quantized import QuantizedLayer
from gracile.nn.quantized_kinds import QuantizedConv, QuantizedEmbedding, QuantizedLinear, quantized_kind
from gracile.nn.recurrent import (
    EncodedWeight,
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRecurrent,
    QuantizedRNN,
    can_be_dynamic,
    recurrent_kind,
)
from gracile.nn.skip import Skip

__all__ = [
    "EncodedWeight",
    "Factorized",
    "FactorizedConv",
    "FactorizedLinear",
    "QuantizedConv",
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedRNN",
    "QuantizedRecurrent",
    "Skip",
    "begin_training",
    "build_layer",
    "can_be_dynamic",
    "compose",
    "end_training",
    "factorized_kind",
    "freeze_batch_norms",
    "keep_sizes",
    "quantize_layer",
    "quantized_kind",
    "recurrent_kind",
]

_LAYERS: dict[str, Callable[[Any, dict[str, Any]], nn.Module]] = {
    "FactorizedLinear": FactorizedLinear,
    "FactorizedConv": FactorizedConv,
    "QuantizedLinear": QuantizedLinear,
    "QuantizedConv": QuantizedConv,
    "QuantizedEmbedding": QuantizedEmbedding,
    "QuantizedLSTM": QuantizedLSTM,
    "QuantizedGRU": QuantizedGRU,
    "QuantizedRNN": QuantizedRNN,
}


def build_layer(layer: str, config: dict[str, Any], old: nn.Module) -> nn.Module:
    """The layer named, with its configuration, taking shapes, bias and device from the layer it replaces.

    layer: "QuantizedLinear", "QuantizedConv", "QuantizedEmbedding", "QuantizedLSTM", "QuantizedGRU", "QuantizedRNN",
        "FactorizedLinear", "FactorizedConv" (their values still to be set or loaded), or "Identity" for a batch norm
        folded away, "Skip" for a residual block left out.
        Anything else raises ArtifactError.
    """
    if layer == "Identity":
        return nn.Identity()
    if layer == "Skip":
        return Skip(**{key: None if value is None else int(value) for key, value in config.items() if key == "outputs"})
    if layer not in _LAYERS:
        raise ArtifactError(f"'{layer}' is not a layer of this version of Gracile.\n  A newer one may have it.")
    try:
        return _LAYERS[layer](old, config)
    except (KeyError, AttributeError) as error:
        raise ArtifactError(f"A {layer} cannot stand for a {type(old).__name__}: {error!r}.") from error


def quantize_layer(old: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]) -> QuantizedLayer:
    """The quantized layer that stands for a float one, with its values.

    tensors: the buffers by name: weight_codes, weight_scale, ... (the weight's format's tensors), input_scale and
        input_zero_point where config has an input format, the same for the output; optionally bias [out], and
        input_multiplier [in] where config has {"smooth": true}.
    config: see `QuantizedLayer`.
    """
    layer = build_layer(str(quantized_kind(old)), config, old)
    assert isinstance(layer, QuantizedLayer)
    layer.set_weight({name: tensors[f"weight_{name}"] for name in layer.weight_tensors})
    for role, fmt in (("input", layer.input_format), ("output", layer.output_format)):
        if fmt is not None and not is_dynamic(fmt):
            layer.set_range(role, tensors[f"{role}_scale"], tensors.get(f"{role}_zero_point"))
    if "input_multiplier" in tensors:
        layer._buffers["input_multiplier"] = tensors["input_multiplier"].detach().float()
    if "bias" in tensors:
        assert layer.bias is not None, "config needs {'bias': true}"
        layer.bias.data = tensors["bias"].detach().to(layer.bias).clone()  # its own: the old layer may live on
    return layer.train(old.training)
