"""Inputs whose tokens have scales of their own: found, divided by and multiplied back around an integer product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gracile.formats import Int
from gracile.nn.ops import format_from_json
from gracile.targets.qdq import Rewriter, tensor_of
from gracile.targets.qdq_weights import gemm_to_matmul
from gracile.targets.translate import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

#: Code of zero: kernels multiply unsigned inputs by signed weights.
ZERO = 128


def write_tokens(rewriter: Rewriter) -> None:
    """Each `QuantizeDequantizePerToken` as a scale for each token, and its layers as MatMulInteger.

    x / s, s = max|x| / qmax, rounded to uint8; codes of inputs times codes of weights in integers; the sum times s and
    the weight's scale. A layer whose weight has scales within a row, or no integers, multiplies s · round(x / s).
    """
    seen: dict[tuple[int, int], _Tokens] = {}
    for node in rewriter.nodes("QuantizeDequantizePerToken", domain=DOMAIN):
        x, qmax, out = node.inputs[0], node.attributes["qmax"].as_int(), node.outputs[0]
        assert x is not None
        for user, _ in list(out.uses()):
            if user.op_type == "Gemm" and user.inputs[1] is not None:
                gemm_to_matmul(rewriter, user.inputs[1])
        key = (id(x), qmax)
        if key not in seen:
            seen[key] = _Tokens(rewriter, node, x, qmax)
        tokens = seen[key]
        for user, index in list(out.uses()):
            weight = _integers(user.inputs[1]) if user.op_type == "MatMul" and index == 0 else None
            if weight is not None:
                tokens.multiply(user, *weight)
        rewriter.replace(out, tokens.decoded() if out.uses() or out.is_graph_output() else x)


class _Tokens:
    """Scales and codes of one tensor's tokens, written before the node that asked for them first."""

    def __init__(self, rewriter: Rewriter, node: ir.Node, x: ir.Value, qmax: int) -> None:
        self.rewriter, self.stem = rewriter, x.name or "x"
        self.x, self.node = x, node
        axes = rewriter.constant(f"{self.stem}_axes", np.array([-1], np.int64))
        peak = self._insert("Abs", [x], x)
        peak = self._insert("ReduceMax", [peak, axes], x, keepdims=1)
        peak.shape = None
        scale = self._insert("Div", [peak, self._number(qmax)], peak)
        self.scale = self._insert("Max", [scale, self._number(torch.finfo(torch.float32).tiny)], peak)
        self.units = self._insert("Div", [x, self.scale], x)
        self.zero = rewriter.constant(f"{self.stem}_zero", np.array(ZERO, np.uint8))
        self._codes: ir.Value | None = None
        self._decoded: ir.Value | None = None

    def multiply(self, product: ir.Node, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """The product with a weight of these codes [in, out] and scales [out] or [], in integers."""
        import onnx_ir as ir

        if self._codes is None:
            grid = [self._number(1.0), self.zero]
            self._codes = self._insert("QuantizeLinear", [self.units, *grid], self.x)
            self._codes.type = ir.TensorType(ir.DataType.UINT8)
        out, rewriter = product.outputs[0], self.rewriter
        weight = rewriter.constant(f"{out.name}_weight", np.ascontiguousarray(codes.numpy()))
        total = rewriter.insert(product, "MatMulInteger", [self._codes, weight, self.zero], f"{out.name}_sum", out)
        total.type = ir.TensorType(ir.DataType.INT32)
        value = rewriter.insert(product, "Cast", [total], f"{out.name}_float", out, to=1)
        by_row = rewriter.constant(f"{out.name}_scale", scale.numpy())
        value = rewriter.insert(product, "Mul", [value, self.scale], f"{out.name}_tokens", out)
        transpose = product.inputs[1].producer() if product.inputs[1] is not None else None
        rewriter.replace(out, rewriter.insert(product, "Mul", [value, by_row], f"{out.name}_scaled", out))
        if transpose is not None and transpose.op_type == "Transpose" and not transpose.outputs[0].uses():
            rewriter.graph.remove(transpose, safe=True)

    def decoded(self) -> ir.Value:
        """s · round(x / s)."""
        if self._decoded is None:
            rounded = self._insert("Round", [self.units], self.x)
            self._decoded = self._insert("Mul", [rounded, self.scale], self.x)
        return self._decoded

    def _insert(self, op_type: str, inputs: list[ir.Value], like: ir.Value, **attributes: int) -> ir.Value:
        return self.rewriter.insert(self.node, op_type, inputs, f"{self.stem}_{op_type}", like, **attributes)

    def _number(self, value: float) -> ir.Value:
        return self.rewriter.constant(f"{self.stem}_number", np.array(value, np.float32))


def _integers(value: ir.Value | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes [in, out] int8 and scales [out] or [] of a weight that is decoded and transposed; None for any other."""
    transpose = value.producer() if value is not None else None
    decode = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if transpose is None or transpose.op_type != "Transpose" or decode is None or decode.op_type != "Decode":
        return None
    fmt = format_from_json(decode.attributes["format"].as_string())
    if not (isinstance(fmt, Int) and fmt.scaled_by_output):
        return None
    names = decode.attributes["names"].as_string().split(",")
    tensors = {name: tensor_of(each) for name, each in zip(names, decode.inputs) if each is not None}
    codes = fmt.unpack(tensors["codes"], tuple(decode.attributes["shape"].as_ints()))
    return codes.T, tensors["scale"].float()
