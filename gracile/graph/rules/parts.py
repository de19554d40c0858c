"""Operators that take dimensions apart or lay them end to end: slice, split, cat, stack, pad."""

from __future__ import annotations

from torch import Tensor

from gracile.graph.algebra import slice_expr, split_expr
from gracile.graph.axes import COUNTS_STACKED, Expr, concatenate, freeze, fresh, frozen_reason, is_fixed, resolve, size
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import broadcast, free, wrap
from gracile.graph.values import NOWHERE, Axis, Value


def slice_(call: Call) -> None:
    """x[start:end:step]; a regular stride over a free axis keeps one of `step` inner positions."""
    tensor, output, step = call["self"], call.output, call["step"]
    dim = wrap(call["dim"], tensor.ndim)
    start = min(max(wrap(call["start"] or 0, tensor.shape[dim]), 0), tensor.shape[dim])
    old = call.dims(tensor)[dim]
    _replace(call, tensor, output, dim, _strided(old, start, output.shape[dim], step))


def _strided(dim: Expr, start: int, length: int, step: int) -> Expr:
    if step == 1:
        return slice_expr(dim, start, length)
    if is_fixed(dim):
        return fresh(length, frozen_reason(dim))
    n = size(dim)
    halves = split_expr(dim, n // step) if n % step == 0 and start < step and length == n // step else None
    if halves is None:
        freeze(dim, "a slice with a stride reads it")
        return fresh(length, "a slice with a stride reads it")
    freeze(halves[1], "a slice with a stride reads one of it")
    return halves[0]


def select(call: Call) -> None:
    """x[index]: the dimension goes; a free axis keeps that index for good."""
    tensor = call["self"]
    dim = wrap(call["dim"], tensor.ndim)
    slice_expr(call.dims(tensor)[dim], wrap(call["index"], tensor.shape[dim]), 1)
    _drop(call, call.value(tensor), call.output, dim)


def unbind(call: Call) -> None:
    """The dimension is taken apart, one tensor per index."""
    tensor = call["self"]
    dim = wrap(call["dim"], tensor.ndim)
    freeze(call.dims(tensor)[dim], "it is taken apart index by index")
    for output in call.output:
        _drop(call, call.value(tensor), output, dim)


def _drop(call: Call, value: Value, output: Tensor, dim: int) -> None:
    dims = value.dims[:dim] + value.dims[dim + 1 :]
    call.set(output, dims, value.sources[:dim] + value.sources[dim + 1 :], value.is_weight)


def split(call: Call) -> None:
    """Consecutive parts of a dimension."""
    tensor = call["self"]
    dim = wrap(call["dim"], tensor.ndim)
    at = 0
    for output in call.output:
        part = slice_expr(call.dims(tensor)[dim], at, output.shape[dim])
        _replace(call, tensor, output, dim, part)
        at += output.shape[dim]


def _replace(call: Call, tensor: Tensor, output: Tensor, dim: int, new: Expr) -> None:
    value = call.value(tensor)
    dims = list(value.dims)
    dims[dim] = new
    call.set(output, dims, value.sources, value.is_weight)


def cat(call: Call) -> None:
    """The joined dimension is a sum; all others are shared."""
    tensors = [t for t in call["tensors"] if t.shape != (0,)]
    dim = wrap(call["dim"], call.output.ndim)
    values = [call.value(tensor) for tensor in tensors]
    joined = concatenate(tuple(value.dims[dim] for value in values))
    if is_fixed(joined):
        joined = fresh(size(joined), frozen_reason(joined))
    others, sources, is_weight = _shared(values, call.output, dim)
    others[dim] = joined
    call.set(call.output, others, sources, is_weight)


def _shared(values: list[Value], output: Tensor, dim: int) -> tuple[list[Expr], list[frozenset[Axis]], bool]:
    """Dimensions other than `dim`, unified over all operands."""
    blank = [
        Value([(), *v.dims[:dim], *v.dims[dim + 1 :]], [NOWHERE, *v.sources[:dim], *v.sources[dim + 1 :]], v.is_weight)
        for v in values
    ]
    shape = [1, *output.shape[:dim], *output.shape[dim + 1 :]]
    dims, sources, is_weight = broadcast(blank, shape)
    joined = NOWHERE.union(*(v.sources[dim] for v in values))
    return [*dims[1 : dim + 1], (), *dims[dim + 1 :]], [*sources[1 : dim + 1], joined, *sources[dim + 1 :]], is_weight


def stack(call: Call) -> None:
    """A new dimension counts the tensors; all others are shared."""
    output = call.output
    dim = wrap(call["dim"], output.ndim)
    values = [call.value(tensor) for tensor in call["tensors"]]
    dims, sources, is_weight = broadcast(values, [*output.shape[:dim], *output.shape[dim + 1 :]])
    dims.insert(dim, fresh(output.shape[dim], COUNTS_STACKED))
    sources.insert(dim, NOWHERE)
    call.set(output, dims, sources, is_weight)


def constant_pad(call: Call) -> None:
    """Padding of a free axis is laid before and after it, and can itself not be cut."""
    tensor, pad = call["self"], list(call["pad"])
    dims = list(call.dims(tensor))
    for i in range(len(pad) // 2):
        low, high, d = pad[2 * i], pad[2 * i + 1], tensor.ndim - 1 - i
        if low == high == 0:
            continue
        dims[d] = _padded(dims[d], low, high)
    call.set(call.output, dims)


def _padded(dim: Expr, low: int, high: int) -> Expr:
    n = size(dim)
    if not free(dim):
        return fresh(n + low + high, frozen_reason(dim) or "it is padded")
    inner = slice_expr(dim, max(-low, 0), n + min(low, 0) + min(high, 0))
    sides = [fresh(k, "it is padding of constants") if k > 0 else None for k in (low, high)]
    return concatenate(tuple(part for part in (sides[0], inner, sides[1]) if part is not None))


def glu(call: Call) -> None:
    """a · sigmoid(b) of the two halves of a dimension."""
    tensor = call["self"]
    dim = wrap(call["dim"], tensor.ndim)
    half = tensor.shape[dim] // 2
    first = slice_expr(call.dims(tensor)[dim], 0, half)
    second = slice_expr(call.dims(tensor)[dim], half, half)
    gate = Value([second], [NOWHERE])
    dims, _, _ = broadcast([Value([first], [NOWHERE]), gate], [half])
    _replace(call, tensor, call.output, dim, resolve(dims[0]))


_SPLITS = (
    "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk split_copy split_with_sizes_copy"
)

RULES: dict[str, Rule] = {
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    **dict.fromkeys(_SPLITS.split(), split),
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": constant_pad,
    "glu": glu,
}
