"""The function mode under which a model is traced: which integer of the forward sized which dimension.

Sizes read from tensors come back as traced integers. What a function is given as sizes becomes a constraint: after a
cut, the integer must again equal the size of that dimension, or the axes in it are frozen.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gracile.graph.axes import Expr, is_fixed, size
from gracile.graph.integers import Constraint, Formula, Size, Source, Traced, source_of
from gracile.graph.notes import NOTES, pin_all
from gracile.graph.recorder import Recorder

logger = logging.getLogger(__name__)


class Provenance(TorchFunctionMode):
    """Runs every function and notes the integers that size what it returns."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.where = ""

    def __torch_function__(self, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward" and isinstance(func, types.FunctionType):
            with self:  # a Python function: look inside, where its integers meet the operators
                return _past_its_own_check(func)(*args, **kwargs)
        output = func(*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.shape or (name == "size" and isinstance(output, tuple)):
            return self._sizes(args[0], output)
        if name == "size" and isinstance(output, int):
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return self._sizes(args[0], args[0].shape)[dim]
        module = self.recorder.modules[-1] if self.recorder.modules else ""
        self.where = f"{name.strip('_')} in {repr(module) if module else 'the model'}"
        note = NOTES.get(name if name.startswith("__") else name.rstrip("_"), pin_all)
        try:
            note(self, args, kwargs, output)
        except Exception as error:  # a form of the function that its note did not foresee must not stop the trace
            logger.debug("note of %s failed: %r", name, error)
            pin_all(self, args, kwargs, output)
        return output

    def _sizes(self, tensor: Tensor, sizes: torch.Size) -> Any:
        """Sizes that know which dimension they measure; those of fixed dimensions are plain."""
        dims = self.recorder.value(tensor).dims
        if len(dims) != len(sizes):
            return sizes
        traced = [n if is_fixed(d) else Traced(n, Size(d), self.equal) for n, d in zip(sizes, dims)]
        return torch.Size(traced)

    def equal(self, left: Source, right: Source) -> None:
        """Two integers that were compared and found equal must stay so."""
        self.recorder.constraints.append(Constraint(Formula("-", left, right), 0, "a comparison of sizes"))

    def tie(self, value: Any, target: Expr) -> None:
        """The integer is the size of the dimension, now and after a cut. -1 is whatever remains."""
        if not isinstance(value, int) or isinstance(value, bool) or int(value) != size(target):
            return
        if isinstance(value, Traced) or not is_fixed(target):
            self.recorder.constraints.append(Constraint(source_of(value), target, self.where))

    def pin(self, value: Any) -> None:
        """The integer is used in a way that is not understood: it must not change."""
        for item in _integers(value):
            self.recorder.constraints.append(Constraint(item.source, int(item), self.where))

    def dims(self, tensor: Tensor) -> list[Expr]:
        return self.recorder.value(tensor).dims


def _integers(tree: Any) -> Iterator[Traced]:
    if isinstance(tree, Traced):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _integers(item)
    elif isinstance(tree, dict):
        yield from _integers(list(tree.values()))
    elif isinstance(tree, slice):
        yield from _integers((tree.start, tree.stop, tree.step))


def _past_its_own_check(func: types.FunctionType) -> Callable[..., Any]:
    """The function without its question whether a mode is active, which it would ask forever."""
    silent = {name: (lambda *_: False) for name in func.__globals__ if name.startswith("has_torch_function")}
    inner = types.FunctionType(func.__code__, {**func.__globals__, **silent}, func.__name__, func.__defaults__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
