"""Operators that rearrange dimensions: view, permute, expand, repeat."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from gracile.graph.algebra import split_expr
from gracile.graph.axes import (
    COUNTS_GROUPS,
    COUNTS_PIXELS,
    COUNTS_REPEATED,
    Expr,
    Factor,
    freeze,
    fresh,
    frozen_reason,
    resolve,
    size,
)
from gracile.graph.recorder import Call, Rule, Unfollowed
from gracile.graph.rules.base import spatial, wrap
from gracile.graph.values import NOWHERE, Axis, Value

UNALIGNED = "a reshape mixes it with other axes"


def view(call: Call) -> None:
    """Dimensions are flattened into their factors and taken apart anew, from the left."""
    reshape(call, call["self"], call.output)


def reshape(call: Call, tensor: Tensor, output: Tensor) -> None:
    """Dimensions of a reshaped tensor, by blocks of dimensions with equal products of sizes."""
    value = call.value(tensor)
    dims: list[Expr] = []
    sources: list[frozenset[Axis]] = []
    for old, new in _blocks(list(tensor.shape), list(output.shape)):
        block = [value.dims[i] for i in old]
        dims.extend(regroup(block, [output.shape[i] for i in new]))
        source = NOWHERE.union(*(value.sources[i] for i in old))
        sources.extend([source] * len(new))
    call.set(output, dims, sources, value.is_weight)


def regroup(dims: Sequence[Expr], sizes: Sequence[int]) -> list[Expr]:
    """The same factors as dimensions of other sizes; where they do not divide so, all are frozen."""
    rest: Expr = tuple(factor for dim in dims for factor in resolve(dim))
    out: list[Expr] = []
    for n in sizes:
        halves = split_expr(rest, n)
        if halves is None:
            reason = frozen_reason(rest) or UNALIGNED
            for dim in dims:
                freeze(dim, reason)
            return [fresh(n, reason) for n in sizes]
        out.append(halves[0])
        rest = resolve(halves[1])
    return out


def _blocks(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and of new dimensions that hold the same elements; dimensions of size one join a neighbour."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + len(left), j + len(right)
        while (a := prod(old[k] for k in left)) != (b := prod(new[k] for k in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        blocks.append((left, right))
    return blocks


def permute(call: Call) -> None:
    value = call.value(call["self"])
    order = [wrap(d, len(value.dims)) for d in call["dims"]]
    _reorder(call, value, order)


def transpose(call: Call) -> None:
    value = call.value(call["self"])
    n = len(value.dims)
    order = list(range(n))
    if n:
        a, b = wrap(call["dim0"], n), wrap(call["dim1"], n)
        order[a], order[b] = b, a
    _reorder(call, value, order)


def matrix_transpose(call: Call) -> None:
    value = call.value(call["self"])
    _reorder(call, value, list(range(len(value.dims)))[::-1])


def _reorder(call: Call, value: Value, order: Sequence[int]) -> None:
    dims, sources = [value.dims[d] for d in order], [value.sources[d] for d in order]
    call.set(call.output, dims, sources, value.is_weight)


def unsqueeze(call: Call) -> None:
    value = call.value(call["self"])
    at = wrap(call["dim"], len(value.dims) + 1)
    dims: list[Expr] = [*value.dims[:at], (), *value.dims[at:]]
    sources = [*value.sources[:at], NOWHERE, *value.sources[at:]]
    call.set(call.output, dims, sources, value.is_weight)


def squeeze(call: Call) -> None:
    """Dimensions of size one go: all of them, or those named."""
    value = call.value(call["self"])
    ndim = len(value.dims)
    named = call.get("dim")
    if named is None:
        chosen = set(range(ndim))
    else:
        chosen = {wrap(d, ndim) for d in (named if isinstance(named, (list, tuple)) else [named])}
    kept = [d for d in range(ndim) if d not in chosen or size(value.dims[d]) != 1]
    _reorder(call, value, kept)


def expand(call: Call) -> None:
    """A dimension of size one that grows is a new dimension: it follows what it is combined with."""
    tensor, output = call["self"], call.output
    value = call.value(tensor)
    lead = output.ndim - tensor.ndim
    dims: list[Expr] = [fresh(n) for n in output.shape[:lead]]
    for d, n in enumerate(output.shape[lead:]):
        dims.append(value.dims[d] if tensor.shape[d] == n else fresh(n))
    call.set(output, dims, [NOWHERE] * lead + value.sources, value.is_weight)


def repeat(call: Call) -> None:
    """A repeated dimension is (repetitions, dimension)."""
    tensor, output = call["self"], call.output
    value = call.value(tensor)
    lead = output.ndim - tensor.ndim
    dims: list[Expr] = []
    for d, times in enumerate(call["repeats"]):
        inner = value.dims[d - lead] if d >= lead else ()
        dims.append((*fresh(int(times), COUNTS_REPEATED), *inner))
    call.set(output, dims, [NOWHERE] * lead + value.sources, value.is_weight)


def pixel_shuffle(call: Call) -> None:
    """[…, c·r·r, h, w] → […, c, h·r, w·r]."""
    _shuffle(call, call["upscale_factor"], down=False)


def pixel_unshuffle(call: Call) -> None:
    """[…, c, h·r, w·r] → […, c·r·r, h, w]."""
    _shuffle(call, call["downscale_factor"], down=True)


def _shuffle(call: Call, factor: int, down: bool) -> None:
    *lead, channels, height, width = call.dims(call["self"])
    square: tuple[Factor, ...] = fresh(factor * factor, COUNTS_PIXELS)
    if down:
        out: Expr = (*channels, *square)
    else:
        halves = split_expr(channels, size(channels) // (factor * factor))
        if halves is None:
            raise Unfollowed("a pixel shuffle cuts across its structure")
        freeze(halves[1], COUNTS_PIXELS)
        out = halves[0]
    for dim in (height, width):
        freeze(dim, "a pixel shuffle moves it")
    sizes = call.output.shape[-2:]
    call.set(call.output, [*lead, out, *(spatial(n) for n in sizes)])


def channel_shuffle(call: Call) -> None:
    """Channels as (groups, rest) become (rest, groups)."""
    batch, channels, *spatial = call.dims(call["self"])
    halves = split_expr(channels, call["groups"])
    if halves is None:
        raise Unfollowed("a channel shuffle cuts across its structure")
    freeze(halves[0], COUNTS_GROUPS)
    call.set(call.output, [batch, (*halves[1], *halves[0]), *spatial])


def view_as_complex(call: Call) -> None:
    """[…, 2] → […]."""
    value = call.value(call["self"])
    freeze(value.dims[-1], "it holds real and imaginary parts")
    _reorder(call, value, list(range(len(value.dims) - 1)))


def view_as_real(call: Call) -> None:
    """[…] → […, 2]."""
    value = call.value(call["self"])
    dims = [*value.dims, fresh(2, "it holds real and imaginary parts")]
    call.set(call.output, dims, [*value.sources, NOWHERE], value.is_weight)


def as_strided(call: Call) -> None:
    """The same elements where only strides of dimensions of size one differ, as a mean over positions leaves them."""
    tensor, output = call["self"], call.output
    wide = [d for d, n in enumerate(tensor.shape) if n > 1]
    same = tensor.shape == output.shape and all(tensor.stride(d) == output.stride(d) for d in wide)
    if not same or tensor.storage_offset() != output.storage_offset():
        raise Unfollowed("it is read with strides of its own")
    _reorder(call, call.value(tensor), range(tensor.ndim))


RULES: dict[str, Rule] = {
    "as_strided": as_strided,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy"), view),
    "permute": permute,
    "transpose": transpose,
    "t": matrix_transpose,
    "numpy_T": matrix_transpose,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "expand_copy": expand,
    "repeat": repeat,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
}
