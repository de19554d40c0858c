"""Encoded weights as integer initializers behind DequantizeLinear, in the layout that runtimes fuse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gracile.formats import Int, MidRise, PerChannel, PerGroup
from gracile.formats.granularity import to_rows
from gracile.formats.packing import pack_bits
from gracile.nn.ops import format_from_json
from gracile.targets.qdq import Rewriter, array_of, tensor_of
from gracile.targets.qdq_gather import write_lookups
from gracile.targets.translate import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir


def write_weights(rewriter: Rewriter) -> None:
    """Each `Decode` as DequantizeLinear of integers, or as floats if neither `Int` nor `MidRise`.

    Integers of up to 4 bits are written as such where inputs stay float and rows have an even number, else in 8 bits.
    A weight that is transposed before use is stored transposed; a fully connected layer with grouped scales becomes
    MatMul + Add over [in, out] with blocks along `in`, the form that runtimes fuse into one operator.
    """
    for node in rewriter.nodes("Decode", domain=DOMAIN):
        fmt = format_from_json(node.attributes["format"].as_string())
        names = node.attributes["names"].as_string().split(",")
        shape = tuple(node.attributes["shape"].as_ints())
        tensors = {name: tensor_of(value) for name, value in zip(names, node.inputs) if value is not None}
        tensors["shape"] = torch.tensor(shape, dtype=torch.int64)
        stem = (node.inputs[0].name or "weight").removesuffix("_codes")  # type: ignore[union-attr]
        out = node.outputs[0]
        if isinstance(fmt, MidRise):
            fmt, tensors = _as_integers(fmt, tensors)
        if not isinstance(fmt, Int):
            rewriter.replace(out, rewriter.constant(stem, fmt.decode(tensors).numpy()))
            continue
        write_lookups(rewriter, out, fmt, tensors, stem)
        if out.uses() or out.is_graph_output():
            _write_integers(rewriter, node, fmt, tensors, stem)
        else:
            rewriter.graph.remove(node, safe=True)


def _as_integers(fmt: MidRise, tensors: dict[str, torch.Tensor]) -> tuple[Int, dict[str, torch.Tensor]]:
    """The levels, which are odd integers, as codes of one more bit that the same scales belong to."""
    codes = fmt.decode({**tensors, "scale": torch.ones_like(tensors["scale"])}).to(torch.int8)
    integers = Int(fmt.bits + 1, fmt.granularity)
    packed = codes if integers.bits == 8 else pack_bits(codes, integers.bits)
    return integers, {**tensors, "codes": packed}


def _write_integers(rewriter: Rewriter, node: ir.Node, fmt: Int, tensors: dict[str, torch.Tensor], stem: str) -> None:
    out, shape = node.outputs[0], tuple(int(n) for n in tensors["shape"])
    codes, scale, zero = fmt.unpack(tensors["codes"], shape), tensors["scale"], tensors.get("zero_point")
    reads_integers = _reads_integers(out)
    # OpenVINO 2026.4 misreads two codes to a byte where a layer's row is an odd number of weights.
    narrow = fmt.bits <= 4 and not reads_integers and not (len(shape) == 2 and shape[1] % 2 == 1)
    if fmt.bits < 4 or not narrow:  # kernels of integers are made for positive scales; only 8 is no int4
        codes, scale = fmt.with_positive_scales(codes, scale)
    encoded = _Encoded(fmt, codes.numpy(), scale.numpy(), None if zero is None else zero.numpy(), narrow)
    if not reads_integers:
        gemm_to_matmul(rewriter, out)
    elif isinstance(fmt.granularity, PerGroup):
        # ONNX Runtime 1.32 puts the constant weight of a Gemm on an int8 grid of its own.
        gemm_to_matmul(rewriter, out)
        rewriter.replace(out, _multiplied_groups(rewriter, node, fmt, tensors, stem))
        return
    if _only_transposed(out):
        encoded, out = encoded.transposed(), _skip_transpose(rewriter, out)
    rewriter.replace(out, _dequantize(rewriter, node, encoded, stem, out))
    if out is not node.outputs[0]:
        rewriter.graph.remove(node, safe=True)


class _Encoded:
    """Codes of a weight in its shape, with scale and zero point along `axis`; blocks along it for grouped scales.

    narrow: whether codes are written in 4 bits. flip: whether the weight is stored transposed.
    """

    def __init__(
        self,
        fmt: Int,
        codes: NDArray[Any],
        scale: NDArray[Any],
        zero_point: NDArray[Any] | None,
        narrow: bool,
        flip: bool = False,
    ) -> None:
        self.fmt, self.codes, self.scale, self.zero_point = fmt, codes, scale, zero_point
        self.narrow, self.flip = narrow, flip

    def transposed(self) -> _Encoded:
        grouped = isinstance(self.fmt.granularity, PerGroup)
        scale = self.scale.T if grouped else self.scale
        zero = self.zero_point.T if grouped and self.zero_point is not None else self.zero_point
        return _Encoded(self.fmt, self.codes.T, scale, zero, self.narrow, flip=True)

    @property
    def attributes(self) -> dict[str, int]:
        granularity = self.fmt.granularity
        if isinstance(granularity, PerGroup):
            return {"axis": 0 if self.flip else 1, "block_size": granularity.size}
        if isinstance(granularity, PerChannel):
            axis = granularity.axis % self.codes.ndim
            return {"axis": 1 - axis if self.flip else axis}
        return {}


def _dequantize(rewriter: Rewriter, node: ir.Node, encoded: _Encoded, stem: str, out: ir.Value) -> ir.Value:
    import onnx_ir as ir

    fmt, codes, narrow = encoded.fmt, encoded.codes, encoded.narrow
    grouped = isinstance(fmt.granularity, PerGroup)
    kind = ("INT4" if narrow else "INT8") if fmt.symmetric else ("UINT4" if narrow else "UINT8")
    dtype = getattr(ir.DataType, kind)
    shape = codes.shape
    if grouped and codes.ndim != 2:
        codes = codes.reshape(shape[0], math.prod(shape[1:]))
    missing = -codes.shape[encoded.attributes["axis"]] % encoded.attributes["block_size"] if grouped else 0
    if missing:  # OpenVINO 2026.4 refuses a last block that is shorter than the others
        codes = np.pad(codes, [(0, missing), (0, 0)] if encoded.flip else [(0, 0), (0, missing)])

    def integers(name: str, array: NDArray[Any]) -> ir.Value:
        array = np.ascontiguousarray(array)
        if not narrow:
            return rewriter.constant(name, array.astype(np.int8 if fmt.symmetric else np.uint8))
        return rewriter.constant(name, array.astype(dtype.numpy()), dtype)

    inputs = [
        integers(f"{stem}_codes", codes),
        rewriter.constant(f"{stem}_scale", np.ascontiguousarray(encoded.scale.astype(np.float32))),
    ]
    if encoded.zero_point is not None or not narrow:  # ONNX Runtime's QGemm is fused only where it is spelled out
        zero_point = np.zeros(encoded.scale.shape) if encoded.zero_point is None else encoded.zero_point
        inputs.append(integers(f"{stem}_zero_point", zero_point))
    new = rewriter.insert(node, "DequantizeLinear", inputs, stem, out, **encoded.attributes)
    if missing:
        new.shape = ir.Shape(codes.shape)
        if encoded.flip and _pad_inputs(rewriter, out, missing):
            return new
        new = rewriter.without_last(node, new, 0 if encoded.flip else 1, missing, out)
    if codes.ndim == len(shape):
        return new
    new.shape = ir.Shape((shape[0], math.prod(shape[1:])))
    target = rewriter.constant(f"{stem}_shape", np.array(shape, np.int64))
    return rewriter.insert(node, "Reshape", [new, target], f"{stem}_reshaped", out)


def _pad_inputs(rewriter: Rewriter, weight: ir.Value, missing: int) -> bool:
    """Append zeros to what is multiplied by a weight [in, out] with as many more rows; whether that could be done."""
    users = list(weight.uses())
    inputs = [user.inputs[0] for user, _ in users]
    if not all(u.op_type == "MatMul" and i == 1 and x is not None and x.shape is not None
               for (u, i), x in zip(users, inputs)):  # fmt: skip
        return False
    for (user, _), x in zip(users, inputs):
        assert x is not None and x.shape is not None
        rank = len(x.shape)
        pads = np.array([0] * (2 * rank - 1) + [missing], np.int64)
        padded = rewriter.insert(user, "Pad", [x, rewriter.constant("pads", pads)], f"{x.name}_padded", x)
        padded.shape = None
        user.replace_input_with(0, padded)
    return True


def _multiplied_groups(
    rewriter: Rewriter, node: ir.Node, fmt: Int, tensors: dict[str, torch.Tensor], stem: str
) -> ir.Value:
    """Grouped scales beside quantized inputs, as (codes − zero point) · scale: no kernel adds up groups in integers.

    ONNX Runtime 1.32 fuses a block-wise DequantizeLinear there into MatMulIntegerToFloat, which fails on its shape.
    """
    shape, out = tuple(int(n) for n in tensors["shape"]), node.outputs[0]
    scale = tensors["scale"].float().unsqueeze(-1)
    codes = to_rows(fmt.granularity, fmt.unpack(tensors["codes"], shape)).reshape(*scale.shape[:2], -1)
    value = rewriter.constant(f"{stem}_codes", codes.numpy())
    steps = [("Cast", None, {"to": 1}), ("Sub", tensors.get("zero_point"), {}), ("Mul", scale, {})]
    for op_type, operand, attributes in steps:
        if op_type == "Sub" and operand is None:
            continue
        inputs = [value]
        if operand is not None:
            array = operand.float().reshape(scale.shape).numpy()
            inputs.append(rewriter.constant(f"{stem}_{op_type}", array))
        value = rewriter.insert(node, op_type, inputs, f"{stem}_{op_type}", out, **attributes)
        value.shape = None
    missing = codes[0].numel() - math.prod(shape[1:])
    if missing:
        flat = rewriter.constant(f"{stem}_rows", np.array((shape[0], -1), np.int64))
        value = rewriter.insert(node, "Reshape", [value, flat], f"{stem}_flat", out)
        value.shape = None
        value = rewriter.without_last(node, value, 1, missing, out)
    target = rewriter.constant(f"{stem}_shape", np.array(shape, np.int64))
    return rewriter.insert(node, "Reshape", [value, target], stem, out)


def write_biases(rewriter: Rewriter) -> None:
    """bias ≈ (input scale · weight scale) · int32, where both scales are of integer tensors.

    A fully connected layer without a bias gets one that is 0 but for one code of 1, the last bit of its integer sum.
    Where QuantizeLinear follows, OpenVINO 2026.4 returns arbitrary numbers without a bias; one of only zeros it drops.
    """
    for node in rewriter.nodes("Conv", "Gemm"):
        x, weight = (dequantize_of(value) for value in node.inputs[:2])
        if x is None or weight is None or "block_size" in weight.attributes:
            continue
        if len(weight.inputs) > 2 and np.any(array_of(weight.inputs[2])):
            continue
        x_scale, w_scale = array_of(x.inputs[1]), array_of(weight.inputs[1])
        if x_scale is None or w_scale is None:
            continue
        scale = (x_scale * w_scale).astype(np.float32)
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None and node.op_type == "Gemm" and node.outputs[0].shape is not None:
            codes: NDArray[Any] | None = np.eye(1, int(node.outputs[0].shape[-1]))[0]  # type: ignore[arg-type]
        else:
            bias = array_of(given)
            codes = None if bias is None else np.round(bias.astype(np.float64) / scale)
        if codes is not None and scale.size in (1, codes.size) and np.abs(codes).max(initial=0) < 2**31:
            _write_bias(rewriter, node, codes, scale)


def _write_bias(rewriter: Rewriter, node: ir.Node, codes: NDArray[Any], scale: NDArray[Any]) -> None:
    stem = f"{node.outputs[0].name}_bias"
    grid = [
        rewriter.constant(f"{stem}_codes", codes.astype(np.int32)),
        rewriter.constant(f"{stem}_scale", scale),
        rewriter.constant(f"{stem}_zero_point", np.zeros(scale.shape, np.int32)),
    ]
    new = rewriter.insert(node, "DequantizeLinear", grid, stem, node.outputs[0], **({"axis": 0} if scale.ndim else {}))
    new.shape = None
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, new)


def dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes out of, or None."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _reads_integers(weight: ir.Value) -> bool:
    """Whether the layer that uses a weight has a quantized input, and so computes in 8-bit integers."""
    for user, _ in weight.uses():
        if user.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and dequantize_of(user.inputs[0]) is not None:
            return True
        if user.op_type == "Transpose" and _reads_integers(user.outputs[0]):
            return True
    return False


def _only_transposed(value: ir.Value) -> bool:
    users = [user for user, _ in value.uses()]
    return bool(users) and all(
        user.op_type == "Transpose" and tuple(user.attributes["perm"].as_ints()) == (1, 0) for user in users
    )


def _skip_transpose(rewriter: Rewriter, value: ir.Value) -> ir.Value:
    """The one output behind the transposes of a value; their readers all read it."""
    first, *others = [user for user, _ in value.uses()]
    for other in others:
        rewriter.replace(other.outputs[0], first.outputs[0])
    return first.outputs[0]


def gemm_to_matmul(rewriter: Rewriter, weight: ir.Value) -> None:
    """Gemm(x, W, b) with transposed W as MatMul(x, Transpose(W)) + b."""
    for gemm, index in list(weight.uses()):
        plain = {"alpha": 1.0, "beta": 1.0}
        scaled = any(name in gemm.attributes and gemm.attributes[name].value != v for name, v in plain.items())
        turned = {name: name in gemm.attributes and gemm.attributes[name].as_int() for name in ("transA", "transB")}
        if gemm.op_type != "Gemm" or index != 1 or scaled or turned["transA"] or not turned["transB"]:
            continue
        import onnx_ir as ir

        out = gemm.outputs[0]
        transposed = ir.node("Transpose", [weight], {"perm": [1, 0]})
        transposed.outputs[0].name = rewriter.fresh(f"{out.name}_weight")
        transposed.outputs[0].type = weight.type
        rewriter.graph.insert_before(gemm, transposed)
        x = gemm.inputs[0]
        assert x is not None
        new = rewriter.insert(gemm, "MatMul", [x, transposed.outputs[0]], f"{out.name}_matmul", out)
        if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
            new = _biased(rewriter, gemm, new, gemm.inputs[2])
        rewriter.replace(out, new)


#: What ONNX Runtime fuses into a float Gemm before it looks for encoded weights.
_ACTIVATIONS = frozenset(("Relu", "Sigmoid", "Tanh", "Softplus", "LeakyRelu", "Elu", "HardSigmoid", "Selu", "Softsign"))


def _biased(rewriter: Rewriter, gemm: ir.Node, product: ir.Value, bias: ir.Value) -> ir.Value:
    """product + bias; in front of an activation as product − (−bias), which no runtime fuses back to a float layer."""
    out, array = gemm.outputs[0], array_of(bias)
    if array is None or not any(user.op_type in _ACTIVATIONS for user, _ in out.uses()):
        return rewriter.insert(gemm, "Add", [product, bias], f"{out.name}_biased", out)
    negative = rewriter.constant(f"{out.name}_negative_bias", -array)
    return rewriter.insert(gemm, "Sub", [product, negative], f"{out.name}_biased", out)
