"""Reductions, softmax and scans along dimensions."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from gracile.graph.axes import Expr, freeze, mark_inexact
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import follow, spatial, wrap
from gracile.graph.values import NOWHERE


def _chosen(call: Call, ndim: int) -> set[int]:
    dim = call.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return set(range(ndim))
    return {wrap(d, ndim) for d in (dim if isinstance(dim, Iterable) else [dim])}


def reduce(call: Call) -> None:
    """Sum, mean, maximum and their like: exact for the dimensions that stay, not for those that go."""
    tensor = call.tensors[0]
    value = call.value(tensor)
    chosen = _chosen(call, tensor.ndim)
    for d in chosen:
        mark_inexact(value.dims[d], f"'{call.name}' is taken over it")
    _keep(call, tensor, chosen)


def pick(call: Call) -> None:
    """Reductions whose result is a position: what they run over cannot be cut."""
    tensor = call.tensors[0]
    chosen = _chosen(call, tensor.ndim)
    for d in chosen:
        freeze(call.dims(tensor)[d], f"'{call.name}' looks for a position along it")
    _keep(call, tensor, chosen)


def _keep(call: Call, tensor: Tensor, chosen: set[int]) -> None:
    value = call.value(tensor)
    for output in call.outputs:
        keepdim = output.ndim == tensor.ndim
        dims: list[Expr] = []
        sources = []
        for d in range(tensor.ndim):
            if d not in chosen:
                dims.append(value.dims[d])
                sources.append(value.sources[d])
            elif keepdim:
                dims.append(())
                sources.append(NOWHERE)
        call.set(output, dims, sources, value.is_weight)


def softmax(call: Call) -> None:
    """Shares of a whole along one dimension."""
    tensor = call.tensors[0]
    value = call.value(tensor)
    for d in range(tensor.ndim) if value.is_weight else _chosen(call, tensor.ndim):
        mark_inexact(value.dims[d], "a softmax is taken over it")
    follow(call, call.output, tensor)


def scan(call: Call) -> None:
    """Operators for which the order along a dimension matters: that dimension cannot be cut."""
    tensor = call.tensors[0]
    named = call.get("dims") if call.get("dims") is not None else call.get("dim")
    chosen = range(tensor.ndim) if named is None or named == [] else (named if isinstance(named, list) else [named])
    for d in chosen:
        freeze(call.dims(tensor)[d], f"'{call.name}' depends on the order along it")
    for output in call.outputs:
        if output.shape == tensor.shape:
            follow(call, output, tensor)
        else:
            _resized(call, output, tensor, {wrap(d, tensor.ndim) for d in chosen})


def _resized(call: Call, output: Tensor, tensor: Tensor, chosen: set[int]) -> None:
    dims = [spatial(n) if d in chosen else call.dims(tensor)[d] for d, n in enumerate(output.shape)]
    call.set(output, dims)


def triangle(call: Call) -> None:
    """tril and triu compare positions along the last two dimensions."""
    tensor = call.tensors[0]
    for dim in call.dims(tensor)[-2:]:
        freeze(dim, f"'{call.name}' depends on the order along it")
    follow(call, call.output, tensor)


_REDUCE = "sum mean amax amin prod var std var_mean std_mean linalg_vector_norm norm logsumexp any all nansum aminmax"
_PICK = "max min argmax argmin median mode kthvalue count_nonzero"
_SCAN = "cumsum cumprod cummax cummin logcumsumexp sort argsort topk flip roll"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCE.split(), reduce),
    **dict.fromkeys(_PICK.split(), pick),
    **dict.fromkeys(_SCAN.split(), scan),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), softmax),
    "tril": triangle,
    "triu": triangle,
}
