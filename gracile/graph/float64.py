"""A forward computed in float64, whatever its author wrote, without a copy of the model.

Parameters are converted where they are used and let go; casts to lower precision inside the forward are ignored, so
that a difference of two runs is a difference of what is computed and not of rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
#: Changes the float64 copy of a parameter or buffer before it is used.
Change = Callable[[Tensor], None]


@contextmanager
def computing_in_float64(model: nn.Module, changes: Mapping[str, Change] | None = None) -> Iterator[None]:
    """Within the context every operator computes in float64, without gradients; the model itself stays as it is.

    changes: name of a parameter or buffer -> what is done to its float64 copy, such as setting parts to zero.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = _Held(
        {id(t): (t, (changes or {}).get(name)) for name, t in tensors.items()},
        {id(b) for b in model.buffers()},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Operators(held), _Functions(held):
            yield
    finally:
        torch.set_default_dtype(before)


class _Held:
    """The model's tensors, converted on demand. Buffers are converted once, since a forward may write into them."""

    def __init__(self, tensors: dict[int, tuple[Tensor, Change | None]], buffers: set[int]) -> None:
        self._tensors = tensors
        self._buffers = buffers
        self._converted: dict[int, Tensor] = {}

    def widen(self, value: Any) -> Any:
        """An argument with tensors and types made wide; anything else as it is."""
        if isinstance(value, Tensor):
            return self.convert(value)
        return WIDER.get(value, value) if isinstance(value, torch.dtype) else value

    def convert(self, tensor: Tensor) -> Tensor:
        """The tensor in float64, changed if it is one of the model's that is to be; others as they are, but wider."""
        if id(tensor) in self._converted:
            return self._converted[id(tensor)]
        if tensor.dtype not in WIDER and id(tensor) not in self._tensors:
            return tensor
        with _disable_current_modes():
            own, change = self._tensors.get(id(tensor), (None, None))
            wide = tensor.detach().to(WIDER.get(tensor.dtype, tensor.dtype), copy=own is not None)
            if change is not None:
                change(wide)
        if id(tensor) in self._buffers:
            self._converted[id(tensor)] = wide
        return wide


class _Operators(TorchDispatchMode):
    """Widens whatever an operator is given, and the type that it is asked to return."""

    def __init__(self, held: _Held) -> None:
        super().__init__()
        self.held = held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and guarding against it would import the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = _map((args, kwargs or {}), self.held.widen)
        return NARROW.get(func._schema.name, func)(*args, **kwargs)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any) -> Tensor:
    """Matrix products of groups: rows of `a` up to each offset with one matrix of `b`, or matrix by matrix."""
    if a.ndim == b.ndim == 3:
        out = a @ b
    elif a.ndim == 2 and b.ndim == 3 and offs is not None:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        ends = [0, *offs.tolist()]
        for group, (start, stop) in enumerate(itertools.pairwise(ends)):
            out[start:stop] = a[start:stop] @ b[group]
    else:
        raise NotImplementedError("grouped products of this form")
    return out if bias is None else out + bias


#: Operators without a kernel for float64, written with others.
NARROW: dict[str, Callable[..., Any]] = {"aten::_grouped_mm": _grouped_mm}


class _Functions(TorchFunctionMode):
    """Widens what a function is given where it would compare types before any operator runs."""

    def __init__(self, held: _Held) -> None:
        super().__init__()
        self.held = held

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("__get__", "__set__", "size", "dim"):  # of shape, dtype, device …
            output = func(*args, **kwargs)
            if not isinstance(output, Tensor):
                return self.held.widen(output) if isinstance(output, torch.dtype) else output
        args, kwargs = _map((args, kwargs), self.held.widen)
        return func(*args, **kwargs)


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_map(item, change) for item in tree)
    return change(tree)
