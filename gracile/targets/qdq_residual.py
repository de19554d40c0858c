"""Residual sums and concatenations that read quantized tensors on every side, so that runtimes keep to integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gracile.targets.qdq import Rewriter, array_of, quantize_pair
from gracile.targets.qdq_weights import dequantize_of

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators that only move values about, or add zeros: what enters on a grid leaves on it.
_MOVING = ("Slice", "Pad", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool")


def share_grids(rewriter: Rewriter) -> None:
    """Let sums and concatenations read their operands from the grids that these already have.

    An operand has a grid if it is dequantized, if it is quantized for another layer anyway, or if it was moved about
    from such a tensor; no range is invented. A sum that is itself quantized is changed where all operands have one.
    Any other reads the quantized form of what an integer layer made, so that this layer need not write floats as well.
    """
    for node in rewriter.nodes("Add", "Concat"):
        operands = [value for value in node.inputs if value is not None]
        if any(array_of(value) is not None for value in operands):
            continue
        if _is_quantized(node.outputs[0]):
            shared = operands if all(_grid(value) for value in operands) else []
        else:
            shared = [value for value in operands if _twin(value) is not None and _made_by_integers(value)]
        for index, value in enumerate(operands):
            if any(value is other for other in shared):
                node.replace_input_with(index, _on_grid(rewriter, node, value))


def _made_by_integers(value: ir.Value) -> bool:
    """Whether a runtime computes a value in integers: a layer or sum of quantized operands, perhaps behind a Relu."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Relu":
        return _made_by_integers(node.inputs[0])  # type: ignore[arg-type]
    layer = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Concat")
    return layer and all(dequantize_of(operand) is not None for operand in node.inputs)


def _is_quantized(value: ir.Value) -> bool:
    """Whether a value is quantized, directly or behind a Relu."""
    for user, _ in value.uses():
        if user.op_type == "QuantizeLinear" or (user.op_type == "Relu" and _is_quantized(user.outputs[0])):
            return True
    return False


def _twin(value: ir.Value) -> ir.Value | None:
    """The dequantized form of a value that some layer reads, or None."""
    for user, _ in value.uses():
        if user.op_type == "QuantizeLinear":
            for reader, _ in user.outputs[0].uses():
                if reader.op_type == "DequantizeLinear":
                    return reader.outputs[0]
    return None


def _moved_from(value: ir.Value) -> ir.Value | None:
    """What a value was moved from, if all the values in it (padding too) are on the grid of that."""
    node = value.producer()
    if node is None or node.op_type not in _MOVING or len(node.outputs) != 1:
        return None
    if node.op_type == "Pad":
        mode = node.attributes.get("mode")
        fill = array_of(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(())
        if (mode is not None and mode.as_string() != "constant") or fill is None or np.any(fill != 0):
            return None
    return node.inputs[0]


def _grid(value: ir.Value) -> list[ir.Value] | None:
    """Scale and zero point of the grid that a value has or could be read from, or None."""
    dequantize = dequantize_of(value) or dequantize_of(_twin(value))
    if dequantize is not None:
        return [v for v in dequantize.inputs[1:] if v is not None] if len(dequantize.inputs) == 3 else None
    source = _moved_from(value)
    return _grid(source) if source is not None else None


def _on_grid(rewriter: Rewriter, reader: ir.Node, value: ir.Value) -> ir.Value:
    """The value as read from its grid: itself, its twin, or itself moved from a grid and marked as lying on it."""
    if dequantize_of(value) is not None:
        return value
    twin = _twin(value)
    if twin is not None:
        return twin
    node, source, grid = value.producer(), _moved_from(value), _grid(value)
    assert node is not None
    assert source is not None
    assert grid is not None
    if len(value.uses()) == 1:
        node.replace_input_with(0, _on_grid(rewriter, node, source))
    return quantize_pair(rewriter, reader, value, grid)
