"""Matrix products: the summed dimension of a weight consumes what it is tied to, the other one produces."""

from __future__ import annotations

from torch import Tensor

from gracile.graph.axes import Expr, freeze, mark_aligned, mark_inexact, mark_kind
from gracile.graph.recorder import Call, Rule, Unfollowed
from gracile.graph.rules.base import broadcast, meet
from gracile.graph.values import Value

#: Rows of the operands of a grouped product start at multiples of this many bytes.
ALIGNMENT = 16
BETWEEN_ACTIVATIONS = "it is summed over between two activations"


def contract(call: Call, a: Value, a_dim: int, b: Value, b_dim: int) -> Expr:
    """Tie the two dimensions that are multiplied and summed over."""
    dim = meet(a.dims[a_dim], b.dims[b_dim])
    call.recorder.contract(a, a_dim)
    call.recorder.contract(b, b_dim)
    if not a.is_weight and not b.is_weight:
        mark_inexact(dim, BETWEEN_ACTIVATIONS)
    return dim


def _make(call: Call, a: Value, a_dim: int, b: Value, b_dim: int) -> None:
    """The outer dimension of a weight is made by a layer; a product of two weights is no layer, no data pass it."""
    if not (a.is_weight and b.is_weight):
        call.recorder.produce(a, a_dim)
        call.recorder.produce(b, b_dim)


def mm(call: Call) -> None:
    """[m, k] · [k, n]."""
    _product(call, call["self"], call["mat2"])


def addmm(call: Call) -> None:
    """bias + [m, k] · [k, n]."""
    _product(call, call["mat1"], call["mat2"], call["self"])


def _product(call: Call, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    a, b = call.value(left), call.value(right)
    summed = contract(call, a, 1, b, 0)
    _make(call, a, 0, b, 1)
    rows, columns = a.dims[0], b.dims[1]
    call.recorder.count(rows, summed, columns)
    is_weight = a.is_weight and b.is_weight
    _add_bias(call, Value([rows, columns], [a.sources[0], b.sources[1]], is_weight), bias)


def bmm(call: Call) -> None:
    """[b, m, k] · [b, k, n]: over a batch of matrices, as attention does over examples and heads."""
    _batched(call, call["self"], call["mat2"])


def baddbmm(call: Call) -> None:
    """input + [b, m, k] · [b, k, n]."""
    _batched(call, call["batch1"], call["batch2"], call["self"])


def _batched(call: Call, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    a, b = call.value(left), call.value(right)
    batch = meet(a.dims[0], b.dims[0])
    summed = contract(call, a, 2, b, 1)
    if a.is_weight or b.is_weight:
        _make(call, a, 1, b, 2)
    else:
        mark_kind(batch, "heads")
        mark_kind(summed, "head_dim")
        mark_kind(b.dims[2], "head_dim")
    call.recorder.count(batch, a.dims[1], summed, b.dims[2])
    is_weight = a.is_weight and b.is_weight
    sources = [a.sources[0], a.sources[1], b.sources[2]]
    _add_bias(call, Value([batch, a.dims[1], b.dims[2]], sources, is_weight), bias)


def _add_bias(call: Call, product: Value, bias: Tensor | None) -> None:
    """The product, with what is added to it, as the output."""
    values = [product] if bias is None else [product, call.value(bias)]
    dims, sources, is_weight = broadcast(values, call.output.shape)
    call.set(call.output, dims, sources, is_weight)


def mv(call: Call) -> None:
    """[m, k] · [k]."""
    a, b = call.value(call["self"]), call.value(call["vec"])
    summed = contract(call, a, 1, b, 0)
    if not b.is_weight:
        call.recorder.produce(a, 0)
    call.recorder.count(a.dims[0], summed)
    call.set(call.output, [a.dims[0]], [a.sources[0]], a.is_weight and b.is_weight)


def dot(call: Call) -> None:
    """Σ a·b."""
    a, b = call.value(call["self"]), call.value(call["tensor"])
    call.recorder.count(contract(call, a, 0, b, 0))
    call.set(call.output, [])


def grouped_mm(call: Call) -> None:
    """[rows, k] · [groups, k, n], rows sorted by group, or [groups, rows, k] · [groups, k, n]."""
    a, b = call.value(call["self"]), call.value(call["mat2"])
    if len(b.dims) != 3:
        raise Unfollowed("a product whose groups are laid along the summed dimension")
    if len(a.dims) == 3:
        lead = [meet(a.dims[0], b.dims[0]), a.dims[1]]
    else:
        freeze(b.dims[0], "rows are sorted by it")
        freeze(a.dims[0], "it is sorted by groups")
        lead = [a.dims[0]]
    summed = contract(call, a, len(a.dims) - 1, b, 1)
    call.recorder.produce(b, 2)
    for dim in (summed, b.dims[2]):
        mark_aligned(dim, max(1, ALIGNMENT // call["self"].element_size()))
    call.recorder.count(*lead, summed, b.dims[2])
    call.set(call.output, [*lead, b.dims[2]])


def linear(call: Call) -> None:
    """x · Wᵀ + b, where a backend keeps it whole."""
    x, weight = call.value(call["input"]), call.value(call["weight"])
    summed = contract(call, x, len(x.dims) - 1, weight, 1)
    if not x.is_weight:
        call.recorder.produce(weight, 0)
    out = weight.dims[0]
    if call.get("bias") is not None:
        out = meet(out, call.dims(call["bias"])[0])
    call.recorder.count(*x.dims[:-1], summed, out)
    call.set(call.output, [*x.dims[:-1], out])


def solve_triangular(call: Call) -> None:
    """X in A·X = B, or in X·A = B: of B, the dimension that A mixes stays whole and the other passes."""
    matrix, right = call.dims(call["self"]), call.dims(call["B"])
    mixed = -2 if call["left"] else -1
    for dim in (*matrix[-2:], right[mixed]):
        freeze(dim, f"'{call.name}' mixes along it")
    lead = [meet(*pair) for pair in zip(matrix[:-2], right[:-2])]
    call.set(call.output, [*lead, *right[-2:]])


RULES: dict[str, Rule] = {
    "mm": mm,
    "addmm": addmm,
    "_addmm_activation": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "_grouped_mm": grouped_mm,
    "mv": mv,
    "dot": dot,
    "linear": linear,
    "linalg_solve_triangular": solve_triangular,
}
