"""What each function of PyTorch is given as sizes, and which dimension of its output each of them sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gracile.graph.algebra import slice_expr, split_expr
from gracile.graph.axes import COUNTS_GROUPS, Expr, fresh, is_fixed, size
from gracile.graph.integers import Constraint, Size

if TYPE_CHECKING:
    from gracile.graph.provenance import Provenance

Note = Callable[["Provenance", tuple[Any, ...], dict[str, Any], Any], None]


def pin_all(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    mode.pin(args)
    mode.pin(kwargs)


def _ignore(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Functions whose integers are dimension numbers, or sizes that some other note has seen."""


def _sized(first: int) -> Note:
    """Sizes of the output, given from the argument `first` on, one by one or as one sequence."""

    def note(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs.get("size", kwargs.get("shape", args[first:]))
        while isinstance(given, (tuple, list)) and given and isinstance(given[0], (tuple, list)):
            given = given[0]
        if isinstance(output, Tensor):
            for n, dim in zip(given, mode.dims(output)):
                mode.tie(n, dim)

    return note


def _unflatten(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    dim, sizes = [*args[1:], *kwargs.values()][:2]
    for n, target in zip(sizes, mode.dims(output)[dim if dim >= 0 else args[0].ndim + dim :]):
        mode.tie(n, target)


def _split(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    sizes, dim = _split_arguments(args, kwargs, "split_size_or_sections", "split_size", "split_sizes")
    each = sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(output)
    for n, part in zip(each, output):
        mode.tie(n, mode.dims(part)[dim])
    if not isinstance(sizes, (tuple, list)) and len(output) > 1 and output[-1].shape[dim] != sizes:
        mode.pin(sizes)


def _tensor_split(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Parts as equal as can be, or parts that begin at given positions."""
    names = ("indices_or_sections", "sections", "indices", "tensor_indices_or_sections")
    given, dim = _split_arguments(args, kwargs, *names)
    if isinstance(given, Tensor):
        return
    if isinstance(given, int):
        _chunk(mode, (args[0], given, dim), {}, output)
        return
    for position in given:
        _prefix(mode, mode.dims(args[0])[dim], position)


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[Any, int]:
    """What says how to split, given second or by one of these names, and the dimension."""
    given = args[1] if len(args) > 1 else next(kwargs[name] for name in names if name in kwargs)
    return given, kwargs.get("dim", args[2] if len(args) > 2 else 0)


def _chunk(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Parts of equal size, which must stay equal; where the last is smaller, none may change."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    first, *others = [mode.dims(part)[dim] for part in output]
    for part in others:
        equal = size(part) == size(first)
        mode.recorder.constraints.append(Constraint(Size(part), first if equal else size(part), mode.where))
    if others and size(others[-1]) != size(first):
        mode.recorder.constraints.append(Constraint(Size(first), size(first), mode.where))


def _select(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    tensor, dim, index = (*args, *kwargs.values())[:3]
    if isinstance(index, int):
        _prefix(mode, mode.dims(tensor)[dim], index)


def _narrow(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    tensor, dim, start, length = (*args, *kwargs.values())[:4]
    if isinstance(start, int):
        _prefix(mode, mode.dims(tensor)[dim], start)
    mode.tie(length, mode.dims(output)[dim])


def _prefix(mode: Provenance, dim: Expr, n: int) -> None:
    """n positions from the front (or, negative, from the back) are told apart by a number."""
    total = size(dim)
    count = int(n)
    if is_fixed(dim) or count == 0 or abs(count) >= total:
        return
    mode.tie(n if count > 0 else -n, slice_expr(dim, 0 if count > 0 else total + count, abs(count)))


def _getitem(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    tensor, key = args[0], args[1]
    keys = key if isinstance(key, tuple) else (key,)
    dims = mode.dims(tensor)
    taken = sum(1 for k in keys if k is not None and k is not Ellipsis and not isinstance(k, bool))
    d = 0
    for k in keys:
        if k is Ellipsis:
            d = len(dims) - (taken - d)
            continue
        if k is None or isinstance(k, bool):
            continue
        if isinstance(k, slice):
            for bound in (k.start, k.stop):
                if isinstance(bound, int) and k.step in (None, 1):
                    _prefix(mode, dims[d], bound)
        elif isinstance(k, int):
            _prefix(mode, dims[d], k)
        d += k.ndim if isinstance(k, Tensor) and k.dtype == torch.bool else 1


def _normalized(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    for n, dim in zip(shape, mode.dims(args[0])[-len(shape) :]):
        mode.tie(n, dim)


def _grouped(position: int, name: str) -> Note:
    """A count of groups: the outer part of the channels."""

    def note(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        groups = kwargs.get(name, args[position] if len(args) > position else 1)
        if not isinstance(output, Tensor) or groups == 1:
            return
        channels = mode.dims(args[0])[1]
        halves = split_expr(channels, int(groups)) if not is_fixed(channels) else None
        mode.tie(groups, halves[0] if halves else fresh(int(groups), COUNTS_GROUPS))

    return note


def _repeat(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Counts of repetition do not change."""
    pin_all(mode, args, kwargs, output)


def _arange(mode: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """What counts positions is frozen, so its bounds must not change."""
    mode.pin(args)
    mode.pin(kwargs)


_DIMENSION_NUMBERS = (
    "transpose permute softmax log_softmax unsqueeze squeeze flatten movedim swapaxes swapdims unbind cat stack "
    "concat concatenate sum mean amax amin dim dropout linear t"
)

NOTES: dict[str, Note] = {
    **dict.fromkeys(_DIMENSION_NUMBERS.split(), _ignore),
    **dict.fromkeys(("view", "reshape", "expand", "new_zeros", "new_ones", "new_empty", "new_full"), _sized(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "randn", "rand"), _sized(0)),
    "broadcast_to": _sized(1),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "tensor_split": _tensor_split,
    "narrow": _narrow,
    "select": _select,
    "chunk": _chunk,
    "__getitem__": _getitem,
    "__setitem__": _getitem,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "group_norm": _grouped(1, "num_groups"),
    **{f"conv{n}d": _grouped(6, "groups") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _grouped(6, "groups") for n in (1, 2, 3)},
    "repeat": _repeat,
    "arange": _arange,
}
