"""From Gracile's two operators to standard ONNX: QuantizeLinear and DequantizeLinear where runtimes look for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gracile.errors import TargetError
from gracile.targets.translate import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir


def to_standard(model: ir.Model) -> None:
    """Replace every node of the `gracile` domain by standard operators, in place.

    Activations: QuantizeLinear → DequantizeLinear, one pair for all readers of one tensor on one grid; where tokens
    have scales of their own see `qdq_tokens`. Weights: see `qdq_weights`. Biases of integer layers become int32, and
    residual additions read quantized tensors, which is what lets ONNX Runtime and OpenVINO compute the whole layer in
    integers.
    """
    from gracile.targets.qdq_residual import share_grids
    from gracile.targets.qdq_tokens import write_tokens
    from gracile.targets.qdq_weights import write_biases, write_weights

    rewriter = Rewriter(model.graph)
    _keep_reduced_axes(rewriter)
    _merge_multiplications(rewriter)
    _write_activations(rewriter)
    write_tokens(rewriter)
    write_weights(rewriter)
    write_biases(rewriter)
    share_grids(rewriter)
    model.graph.sort()
    left = sorted({node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN})
    if left:
        raise TargetError(
            f"A quantized layer inside a conditional or a loop cannot be exported ({', '.join(left)}).\n"
            f"  Exclude it from quantization."
        )
    model.opset_imports.pop(DOMAIN, None)


class Rewriter:
    """A graph, with the few operations that rewriting needs."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0

    def nodes(self, *op_types: str, domain: str = "") -> list[ir.Node]:
        """The nodes of these types, in order."""
        return [node for node in self.graph if node.op_type in op_types and node.domain == domain]

    def constant(self, name: str, array: NDArray[Any], dtype: Any = None) -> ir.Value:
        """A new initializer. dtype: an `onnx_ir.DataType` where NumPy has none (4-bit integers)."""
        import onnx_ir as ir

        name = self.fresh(name)
        tensor = ir.Tensor(array, name=name, dtype=dtype)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value, **attributes: int | str
    ) -> ir.Value:
        """A new node before another; its output has the shape and type of `like`."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = node.name = self.fresh(name)
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def without_last(self, before: ir.Node, value: ir.Value, axis: int, count: int, like: ir.Value) -> ir.Value:
        """The value without the last `count` of this axis, sliced before a node; of the type of `like`."""
        ends = (("start", 0), ("end", -count), ("axis", axis))
        bounds = [self.constant(name, np.array([n], np.int64)) for name, n in ends]
        sliced = self.insert(before, "Slice", [value, *bounds], "whole", like)
        sliced.shape = None
        return sliced

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """`redirect`, and the node that made `old` goes."""
        node = old.producer()
        assert node is not None
        self.redirect(old, new)
        self.graph.remove(node, safe=True)

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Every reader of `old`, and the graph's outputs, read `new`."""
        for user, index in list(old.uses()):
            if user is not new.producer():
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new

    def fresh(self, name: str) -> str:
        """A name that no other value has."""
        self._count += 1
        return f"{name}_q{self._count}"


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The values of a constant, None for what is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def tensor_of(value: ir.Value) -> torch.Tensor:
    """A constant as a torch tensor."""
    array = array_of(value)
    if array is None:
        raise TargetError(f"'{value.name}' is computed when the model runs; a quantized layer's tensors are constants.")
    return torch.from_numpy(np.array(array))


def _keep_reduced_axes(rewriter: Rewriter) -> None:
    """Extremes that are put on a grid, with their axes kept and then squeezed away.

    OpenVINO 2026.4 fuses a grid into a ReduceMax or ReduceMin without the axes, and gets its values wrong by a fifth.
    """
    for node in rewriter.nodes("ReduceMax", "ReduceMin"):
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        out = node.outputs[0]
        if keeps or not any(user.op_type == "QuantizeDequantize" for user, _ in out.uses()):
            continue
        inputs = [value for value in node.inputs if value is not None]
        others = {name: a.as_int() for name, a in node.attributes.items() if name != "keepdims"}
        kept = rewriter.insert(node, node.op_type, inputs, f"{out.name}_kept", out, **others, keepdims=1)
        kept.shape = None
        rewriter.replace(out, rewriter.insert(node, "Squeeze", [kept, *inputs[1:]], f"{out.name}_squeezed", out))


def _merge_multiplications(rewriter: Rewriter) -> None:
    """One multiplication for all layers that smooth one tensor by the same constant, so that they share its grid."""
    seen: list[tuple[ir.Value, NDArray[Any], ir.Value]] = []
    for node in rewriter.nodes("Mul"):
        x, factor = node.inputs
        constant = array_of(factor)
        if (
            x is None
            or constant is None
            or not all(u.op_type.startswith("QuantizeDequantize") for u, _ in node.outputs[0].uses())
        ):
            continue
        same = (out for other, values, out in seen if other is x and np.array_equal(values, constant))
        first = next(same, None)
        if first is None:
            seen.append((x, constant, node.outputs[0]))
        else:
            rewriter.replace(node.outputs[0], first)


def _write_activations(rewriter: Rewriter) -> None:
    """Each `QuantizeDequantize` as a pair; readers of one tensor on one grid share it."""
    seen: dict[tuple[int, float, int, int, int], ir.Value] = {}
    for node in rewriter.nodes("QuantizeDequantize", domain=DOMAIN):
        x, scale, zero_point = (value for value in node.inputs if value is not None)
        qmin, qmax = (node.attributes[name].as_int() for name in ("qmin", "qmax"))
        key = (id(x), float(tensor_of(scale)), int(tensor_of(zero_point)), qmin, qmax)
        if key not in seen:
            seen[key] = _pair(rewriter, node, x, *key[1:])
        rewriter.replace(node.outputs[0], seen[key])


def _pair(
    rewriter: Rewriter, node: ir.Node, x: ir.Value, scale: float, zero_point: int, qmin: int, qmax: int
) -> ir.Value:
    """x → [Clip →] QuantizeLinear → DequantizeLinear; the clip only for ranges narrower than 8 bits."""
    stem = x.name or "x"
    step = np.float32(scale)
    if qmax - qmin < 255:
        low, high = (np.float32(q - zero_point) * step for q in (qmin, qmax))
        bounds = [rewriter.constant(f"{stem}_{end}", np.array(v)) for end, v in (("low", low), ("high", high))]
        x = rewriter.insert(node, "Clip", [x, *bounds], f"{stem}_clipped", x)
    dtype = np.int8 if qmin < 0 else np.uint8
    grid = [
        rewriter.constant(f"{stem}_scale", np.array(step)),
        rewriter.constant(f"{stem}_zero_point", np.array(zero_point, dtype)),
    ]
    return quantize_pair(rewriter, node, x, grid)


def quantize_pair(rewriter: Rewriter, before: ir.Node, x: ir.Value, grid: list[ir.Value]) -> ir.Value:
    """x → QuantizeLinear → DequantizeLinear on a grid (its scale and zero point); returns the last output."""
    import onnx_ir as ir

    codes = rewriter.insert(before, "QuantizeLinear", [x, *grid], f"{x.name}_codes", x)
    codes.type = ir.TensorType(grid[1].dtype)  # type: ignore[arg-type]
    return rewriter.insert(before, "DequantizeLinear", [codes, *grid], f"{x.name}_grid", x)
