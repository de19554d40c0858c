"""LSTMs that round inputs and states as they come, as the one operator that computes them in integers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gracile.formats import Int
from gracile.nn import EncodedWeight, QuantizedRecurrent
from gracile.nn.sequences import directions
from gracile.targets.qdq import Rewriter, array_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

#: Of ONNX Runtime's own operators.
DOMAIN = "com.microsoft"
#: PyTorch's gates (input, forget, cell, output) in ONNX's order (input, output, forget, cell).
GATES = (0, 3, 1, 2)


def write_lstms(model: ir.Model, layers: Iterable[QuantizedRecurrent]) -> None:
    """Each LSTM of the dynamic ones among these layers as DynamicQuantizeLSTM on its integer weights, in place.

    layers: those whose decoded weights the graph's LSTMs hold, by which these are recognised.
    """
    depths = [depth for layer in layers if layer.dynamic for depth in _depths(layer)]
    if not depths:
        return
    rewriter = Rewriter(model.graph)
    _fold_weights(model, rewriter)
    written: set[int] = set()
    for node in rewriter.nodes("LSTM"):
        found = next((i for i, depth in enumerate(depths) if depth.is_in(node)), None)
        if found is not None:
            _write(rewriter, node, depths[found])
            written.add(found)
    if written:
        model.opset_imports[DOMAIN] = 1
    if len(written) < len(depths):
        left = len(depths) - len(written)
        logger.warning("%d of %d depths of LSTMs are not in the file in integers.", left, len(depths))


def _fold_weights(model: ir.Model, rewriter: Rewriter) -> None:
    """Weights of LSTMs as constants; the exporter leaves the order of their gates to the file where they are large."""
    from onnxscript.optimizer import fold_constants

    behind: set[ir.Node] = set()
    ahead = [value for node in rewriter.nodes("LSTM") for value in node.inputs[1:3]]
    while ahead:
        value = ahead.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in behind:
            behind.add(node)
            ahead += node.inputs
    fold_constants(model, should_fold=lambda node: node in behind)


@dataclass(frozen=True)
class _Matrix:
    """One matrix of both directions, its gates in ONNX's order.

    floats, codes: [directions, 4 · hidden, in]. scale: [directions, 4 · hidden].
    """

    floats: NDArray[Any]
    codes: NDArray[Any]
    scale: NDArray[Any]


@dataclass(frozen=True)
class _Depth:
    """One depth of a layer: what reads inputs, and what reads states."""

    inputs: _Matrix
    states: _Matrix

    def is_in(self, node: ir.Node) -> bool:
        """Whether the node computes with these weights."""
        held = [array_of(value) for value in node.inputs[1:3]]
        wanted = (self.inputs.floats, self.states.floats)
        return all(have is not None and np.array_equal(have, want) for have, want in zip(held, wanted, strict=True))


def _depths(layer: QuantizedRecurrent) -> Iterator[_Depth]:
    ends = directions(layer)
    for depth in range(layer.num_layers):
        parts = [[layer.encoded[f"weight_{part}_l{depth}{end}"] for end in ends] for part in ("ih", "hh")]
        yield _Depth(*(_matrix(matrices) for matrices in parts))  # type: ignore[arg-type]


def _matrix(directions: list[EncodedWeight]) -> _Matrix:
    parts = []
    for weight in directions:
        fmt, tensors = weight.weight_format, weight.encoded_weight()
        assert isinstance(fmt, Int)
        codes = fmt.unpack(tensors["codes"], weight.weight_shape)
        codes, scale = fmt.with_positive_scales(codes, tensors["scale"].float())
        scale = scale.expand(len(codes))
        parts.append([_in_order(t.detach().numpy()) for t in (weight.decoded_weight(), codes, scale)])
    return _Matrix(*(np.stack(each) for each in zip(*parts)))


def _in_order(rows: NDArray[Any]) -> NDArray[Any]:
    gates = rows.reshape(len(GATES), -1, *rows.shape[1:])
    return gates[list(GATES)].reshape(rows.shape)


def _write(rewriter: Rewriter, node: ir.Node, depth: _Depth) -> None:
    import onnx_ir as ir

    stem = node.outputs[0].name or "lstm"
    weights, grids = [], []
    for part, matrix in (("inputs", depth.inputs), ("states", depth.states)):
        codes = np.ascontiguousarray(matrix.codes.astype(np.int8).swapaxes(1, 2))
        weights.append(rewriter.constant(f"{stem}_{part}_weight", codes))
        grids.append(rewriter.constant(f"{stem}_{part}_scale", matrix.scale))
        grids.append(rewriter.constant(f"{stem}_{part}_zero_point", np.zeros(matrix.scale.shape, np.int8)))
    given = [*node.inputs, *[None] * 8][:8]  # x, weights, bias, lengths, states, peepholes
    new = ir.node(
        "DynamicQuantizeLSTM",
        [given[0], *weights, *given[3:], *grids],
        {name: attribute.value for name, attribute in node.attributes.items() if name != "layout"},
        domain=DOMAIN,
        num_outputs=len(node.outputs),
    )
    rewriter.graph.insert_before(node, new)
    for old, value in zip(node.outputs, new.outputs, strict=True):
        value.shape, value.type, value.name = old.shape, old.type, rewriter.fresh(old.name or stem)
        rewriter.redirect(old, value)
    rewriter.graph.remove(node, safe=True)
