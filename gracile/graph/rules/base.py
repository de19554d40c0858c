"""What several rules need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gracile.graph.algebra import unify
from gracile.graph.axes import COUNTS_POSITIONS, Expr, fresh, is_fixed
from gracile.graph.recorder import Call
from gracile.graph.values import NOWHERE, Axis, Value


def spatial(n: int) -> Expr:
    """A dimension whose size follows from the input's and from kernels and strides."""
    return fresh(n, COUNTS_POSITIONS)


def wrap(dim: int, ndim: int) -> int:
    """A dimension number counted from the front."""
    return dim + ndim if dim < 0 else dim


def broadcast(values: Sequence[Value], shape: Sequence[int]) -> tuple[list[Expr], list[frozenset[Axis]], bool]:
    """Dimensions, sources and weight-ness of elementwise operands aligned from the right; what meets is unified."""
    dims: list[Expr] = []
    sources: list[frozenset[Axis]] = []
    for back in range(len(shape), 0, -1):
        n = shape[-back]
        found: Expr | None = None if n != 1 else ()
        source = NOWHERE
        for value in values:
            if len(value.dims) < back:
                continue
            source |= value.sources[-back]
            dim = value.dims[-back]
            if n == 1 or _is_one(dim):
                continue
            if found is None:
                found = dim
            else:
                unify(found, dim)
        dims.append(fresh(n) if found is None else found)
        sources.append(source)
    return dims, sources, all(value.is_weight for value in values if value.dims)


def _is_one(dim: Expr) -> bool:
    return not dim or all(factor.size == 1 for factor in dim)


def meet(x: Expr, y: Expr) -> Expr:
    """The dimension that both are, after unifying them; a size of one broadcasts."""
    if _is_one(x):
        return y
    if not _is_one(y):
        unify(x, y)
    return x


def follow(call: Call, output: Tensor, like: Tensor) -> None:
    """Give the output everything known of a tensor of the same shape."""
    value = call.value(like)
    call.set(output, value.dims, value.sources, value.is_weight)


def free(dim: Expr) -> bool:
    """Whether something in the dimension can be cut."""
    return not is_fixed(dim)
