"""Look-ups by index: what is looked up in keeps all its entries, the rest passes."""

from __future__ import annotations

import torch

from gracile.graph.axes import Expr, freeze, fresh
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import broadcast, follow, meet, wrap
from gracile.graph.values import NOWHERE, Value

VOCABULARY = "it is the vocabulary of an embedding"
INDEXED = "its entries are picked by index"
WRITTEN = "values are written into it by index"


def embedding(call: Call) -> None:
    """weight[indices]."""
    weight = call.value(call["weight"])
    freeze(weight.dims[0], VOCABULARY)
    call.recorder.produce(weight, 1)
    call.set(call.output, [*call.dims(call["indices"]), weight.dims[1]])


def embedding_bag(call: Call) -> None:
    """Sums or means of rows of the weight."""
    weight = call.value(call["weight"])
    freeze(weight.dims[0], VOCABULARY)
    call.recorder.produce(weight, 1)
    first, *rest = call.outputs
    call.set(first, [fresh(first.shape[0], INDEXED), weight.dims[1]])
    for output in rest:
        call.set(output, [fresh(n, INDEXED) for n in output.shape])


def index_select(call: Call) -> None:
    tensor = call["self"]
    dim = wrap(call["dim"], tensor.ndim)
    value = call.value(tensor)
    freeze(value.dims[dim], INDEXED)
    dims = list(value.dims)
    dims[dim] = fresh(call.output.shape[dim], INDEXED)
    call.set(call.output, dims, value.sources, value.is_weight)


def index(call: Call) -> None:
    """x[i, j, …] with tensors of indices: indexed dimensions give way to those of the index tensors."""
    tensor, indices = call["self"], list(call["indices"])
    value = call.value(tensor)
    indices += [None] * (tensor.ndim - len(indices))
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        call.freeze_all("a mask picks entries of it")
        return
    where = [d for d, i in enumerate(indices) if i is not None]
    picked = [call.value(i) for i in indices if i is not None]
    rank = max(len(v.dims) for v in picked)
    for d in where:
        freeze(value.dims[d], INDEXED)
    adjacent = where == list(range(where[0], where[-1] + 1))
    at = where[0] if adjacent else 0
    shape = call.output.shape[at : at + rank]
    looked_up, _, _ = broadcast([Value(v.dims, [NOWHERE] * len(v.dims)) for v in picked], shape)
    rest = [d for d in range(tensor.ndim) if d not in where]
    dims: list[Expr] = [value.dims[d] for d in rest]
    sources = [value.sources[d] for d in rest]
    is_weight = value.is_weight and all(v.is_weight for v in picked)
    call.set(
        call.output, [*dims[:at], *looked_up, *dims[at:]], [*sources[:at], *[NOWHERE] * rank, *sources[at:]], is_weight
    )


def gather(call: Call) -> None:
    """Entries picked along one dimension, for every position of the others, which are not followed."""
    for tensor in call.tensors:
        for dim in call.dims(tensor):
            freeze(dim, INDEXED)
    call.set(call.output, [fresh(n, INDEXED) for n in call.output.shape])


def put(call: Call) -> None:
    """x[i, j, …] = values: dimensions that are not indexed are those of the values."""
    tensor, values = call["self"], call.value(call["values"])
    target = call.value(tensor)
    indexed: list[int] = []
    kept: list[int] = []
    rank = 0
    for i in call["indices"]:
        d = len(indexed) + len(kept)
        if i is None:
            kept.append(d)
            continue
        mask = i.dtype in (torch.bool, torch.uint8)
        indexed += range(d, d + (i.ndim if mask else 1))
        rank = max(rank, 1 if mask else i.ndim)
        for dim in call.dims(i):
            freeze(dim, INDEXED)
    kept += range(len(indexed) + len(kept), tensor.ndim)
    at = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    chosen: list[int | None] = [*kept[:at], *[None] * rank, *kept[at:]]
    for place, dim in zip(reversed(chosen), reversed(values.dims)):
        if place is None:
            freeze(dim, WRITTEN)
        else:
            meet(target.dims[place], dim)
    for d in indexed:
        freeze(target.dims[d], WRITTEN)
    call.set(call.output, target.dims, target.sources, target.is_weight and values.is_weight)


def put_along(call: Call) -> None:
    """`index_add` and `index_copy` write slices along one dimension; the others are those of the slices."""
    target, source = call.value(call["self"]), call.value(call["source"])
    along = wrap(call["dim"], len(target.dims))
    for d, (mine, its) in enumerate(zip(target.dims, source.dims)):
        if d == along:
            freeze(mine, WRITTEN)
            freeze(its, WRITTEN)
        else:
            meet(mine, its)
    call.set(call.output, target.dims, target.sources, target.is_weight and source.is_weight)


def write(call: Call) -> None:
    """`scatter` and its like write at positions given as data."""
    for tensor in call.tensors:
        for dim in call.dims(tensor):
            freeze(dim, WRITTEN)
    follow(call, call.output, call["self"])


_WRITES = "scatter scatter_add scatter_reduce masked_scatter index_fill"

RULES: dict[str, Rule] = {
    "embedding": embedding,
    "embedding_renorm": gather,
    "_embedding_bag": embedding_bag,
    "_embedding_bag_forward_only": embedding_bag,
    "index_select": index_select,
    "index": index,
    "_unsafe_index": index,
    "gather": gather,
    **dict.fromkeys(("index_put", "_index_put_impl"), put),
    **dict.fromkeys(("index_add", "index_copy"), put_along),
    **dict.fromkeys(_WRITES.split(), write),
}
