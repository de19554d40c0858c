"""How the operators of quantized layers pass PyTorch's ONNX exporter: each as one node, rewritten afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

#: Domain of the nodes that stand for Gracile's operators between the export and `qdq.to_standard`.
DOMAIN = "gracile"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The exporter's `custom_translation_table` for the operators in `gracile.nn.ops`."""
    from onnxscript import values

    opset = values.Opset(DOMAIN, 1)
    rounding = values.Op(opset, "QuantizeDequantize", _schema("QuantizeDequantize", qmin="INT", qmax="INT"))
    by_token = values.Op(opset, "QuantizeDequantizePerToken", _schema("QuantizeDequantizePerToken", qmax="INT"))
    decoding = values.Op(opset, "Decode", _schema("Decode", names="STRING", format="STRING", shape="INTS"))

    def quantize_dequantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        return rounding(x, scale, zero_point, qmin=qmin, qmax=qmax)

    def quantize_dequantize_per_token(x: Any, qmax: int) -> Any:
        return by_token(x, qmax=qmax)

    def decode(tensors: Sequence[Any], names: str, format: str, shape: Sequence[int]) -> Any:
        return decoding(*tensors, names=names, format=format, shape=shape)

    return {
        torch.ops.gracile.quantize_dequantize.default: quantize_dequantize,
        torch.ops.gracile.quantize_dequantize_per_token.default: quantize_dequantize_per_token,
        torch.ops.gracile.decode.default: decode,
    }


@lru_cache
def _schema(name: str, **attributes: str) -> Any:
    from onnx.defs import OpSchema

    parameter = OpSchema.FormalParameter
    variadic = OpSchema.FormalParameterOption.Variadic
    types = [f"tensor({t})" for t in ("float", "int8", "uint8", "int16", "int32", "int64")]
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter("inputs", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[parameter("output", "T")],
        type_constraints=[("T", types, "")],
        attributes=[OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind)) for key, kind in attributes.items()],
    )
