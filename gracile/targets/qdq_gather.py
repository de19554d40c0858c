"""Encoded embeddings: look up codes, then decode only the rows found; the table stays small in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gracile.formats import Int, PerChannel, PerGroup
from gracile.targets.qdq import Rewriter

if TYPE_CHECKING:
    import onnx_ir as ir


def write_lookups(rewriter: Rewriter, table: ir.Value, fmt: Int, tensors: dict[str, torch.Tensor], stem: str) -> None:
    """Each Gather of rows of a decoded table as a Gather of its codes and scales, and arithmetic on what was gathered.

    table: the decoded table's value, [rows, width]. Codes of 4 bits and fewer are stored two to a byte where the width
    is even: the low nibble is the even column.
    """
    lookups = [user for user, index in table.uses() if user.op_type == "Gather" and index == 0]
    lookups = [node for node in lookups if "axis" not in node.attributes or node.attributes["axis"].as_int() == 0]
    shape = tuple(int(n) for n in tensors["shape"])
    if not lookups or len(shape) != 2:
        return
    codes = fmt.unpack(tensors["codes"], shape).numpy()
    zero = tensors.get("zero_point")
    lookup = _Lookup(rewriter, stem, fmt, codes, tensors["scale"].numpy(), None if zero is None else zero.numpy())
    for node in lookups:
        rewriter.replace(node.outputs[0], lookup.rows(node))


class _Lookup:
    """The constants of one table, and the nodes that read rows of it."""

    def __init__(
        self,
        rewriter: Rewriter,
        stem: str,
        fmt: Int,
        codes: NDArray[Any],
        scale: NDArray[Any],
        zero_point: NDArray[Any] | None,
    ) -> None:
        self.rewriter, self.stem, self.width = rewriter, stem, codes.shape[1]
        size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None
        missing = 0 if size is None else -self.width % size
        codes = np.pad(codes, [(0, 0), (0, missing)]) if missing else codes
        self.padded = codes.shape[1]
        self.packed = fmt.bits <= 4 and self.padded % 2 == 0
        self.by_row = size is not None or (isinstance(fmt.granularity, PerChannel) and fmt.granularity.axis % 2 == 0)
        self.group = size or self.width
        offset = np.zeros(scale.shape) if zero_point is None else zero_point.astype(np.float64)
        if self.packed:
            nibbles = (codes.astype(np.int16) + (8 if fmt.symmetric else 0)).astype(np.uint8)
            offset = offset + (8 if fmt.symmetric else 0)
            codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        self.codes = rewriter.constant(f"{stem}_codes", np.ascontiguousarray(codes))
        if self.by_row:  # one or more scales for each row, so they are looked up with it
            scale, offset = (array.reshape(codes.shape[0], -1, 1) for array in (scale, offset))
        self.scale = rewriter.constant(f"{stem}_scale", scale.astype(np.float32))
        self.offset = rewriter.constant(f"{stem}_offset", offset.astype(np.float32)) if np.any(offset) else None

    def rows(self, node: ir.Node) -> ir.Value:
        """The decoded rows that a Gather node asks for, [*indices, width]."""
        indices, out = node.inputs[1], node.outputs[0]
        assert indices is not None
        codes = self._insert(node, "Gather", [self.codes, indices], "found", out)
        if self.packed:
            codes = self._unpacked(node, codes, out)
        rows = self._insert(node, "Cast", [codes], "float", out, to=1)
        if self.by_row:
            rows = self._reshaped(node, rows, out, (-1, self.group))
        for op_type, constant in (("Sub", self.offset), ("Mul", self.scale)):
            if constant is None:
                continue
            if self.by_row:
                constant = self._insert(node, "Gather", [constant, indices], f"{op_type}_rows", out)
            rows = self._insert(node, op_type, [rows, constant], op_type, out)
        if self.by_row:
            rows = self._reshaped(node, rows, out, (self.padded,))
        if self.padded == self.width:
            return rows
        return self.rewriter.without_last(node, rows, -1, self.padded - self.width, out)

    def _unpacked(self, node: ir.Node, packed: ir.Value, out: ir.Value) -> ir.Value:
        constant = self.rewriter.constant
        low = self._insert(node, "BitwiseAnd", [packed, constant("mask", np.array(15, np.uint8))], "low", out)
        high = self._insert(
            node, "BitShift", [packed, constant("four", np.array(4, np.uint8))], "high", out, direction="RIGHT"
        )
        last = constant("last", np.array([-1], np.int64))
        halves = [self._insert(node, "Unsqueeze", [half, last], "half", out) for half in (low, high)]
        return self._reshaped(node, self._insert(node, "Concat", halves, "both", out, axis=-1), out, (self.padded,))

    def _reshaped(self, node: ir.Node, value: ir.Value, out: ir.Value, tail: tuple[int, ...]) -> ir.Value:
        """[*indices, ...] as [*indices, *tail]."""
        assert out.shape is not None
        target = np.array([0] * (len(out.shape) - 1) + list(tail), np.int64)  # 0 keeps a dimension as it is
        shape = self.rewriter.constant("rows_shape", target)
        return self._insert(node, "Reshape", [value, shape], "rows", out)

    def _insert(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value], name: str, out: ir.Value, **attributes: int | str
    ) -> ir.Value:
        value = self.rewriter.insert(node, op_type, inputs, f"{self.stem}_{name}", out, **attributes)
        value.shape, value.type = None, None  # what lies between has other shapes and types than the rows
        return value
