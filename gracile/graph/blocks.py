"""Residual blocks: modules that add something to their input, so that the model still makes sense without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.graph.values import tensors_in
from gracile.modes import eval_mode

#: Operators, by the names of their gradients, through which an input passes on to the output: sums aside, activations,
#: normalisations and copies, of which only the first argument counts.
PASSING = frozenset(
    f"{name}Backward0"
    for name in (
        *("Relu", "Gelu", "Silu", "Hardswish", "LeakyRelu", "Elu", "Tanh", "Clone", "Alias", "ToCopy"),
        *("NativeLayerNorm", "NativeBatchNorm", "NativeDropout"),
    )
)
SUM = "AddBackward0"

#: A tensor in the graph of gradients: the operator that made it, and which of its results it is.
Made = tuple[Any, int]


@dataclass(frozen=True)
class Block:
    """A residual block.

    kind: its class. outputs: None where it returns a tensor, else the length of the tuple whose first item is its
    result. reason: why it cannot be left out; None where it may be.
    """

    name: str
    kind: str
    outputs: int | None
    reason: str | None = None


def find_blocks(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Block]:
    """Modules whose output is a sum of their input and something made of it, up to activations and norms, in order.

    Found from the graph of gradients of one run in eval mode, not by names. Of modules in an `nn.Sequential` or
    `nn.ModuleList` the innermost count; then others that neither hold such a one nor lie in one, the innermost again.
    """
    watch = _Watch(model)
    with eval_mode(model), _differentiable(model), watch.hooks(), torch.enable_grad():
        run(model)
    in_chain = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        for key in module._modules
    }
    chosen = _innermost([name for name in watch.residual if name in in_chain])
    others = [name for name in watch.residual if not any(_related(name, other) for other in chosen)]
    names = set(chosen) | set(_innermost(others))
    modules = dict(model.named_modules())
    return [
        Block(
            name,
            type(modules[name]).__name__,
            watch.residual[name],
            None if watch.calls[name] == 1 else f"it is called {watch.calls[name]} times in one forward",
        )
        for name in modules
        if name in names
    ]


def _innermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Every floating parameter requires a gradient within the context."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        if p.is_floating_point():
            p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


class _Watch:
    """Hooks that compare what goes into each module with what comes out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entered: dict[str, list[tuple[Made, torch.Size] | None]] = {}
        self.calls: dict[str, int] = {}
        self.residual: dict[str, int | None] = {}  # name -> the form of its output

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [self.model.register_forward_pre_hook(_follow_inputs, with_kwargs=True)]
        for name, module in self.model.named_modules():
            if name and any(p.ndim > 1 for p in module.parameters()):
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(tensors_in((*args, *kwargs.values())), None)
            known = x is not None and x.grad_fn is not None
            self.entered.setdefault(name, []).append(((x.grad_fn, x.output_nr), x.shape) if known else None)  # type: ignore[union-attr]

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            before = self.entered[name].pop()
            y = output[0] if isinstance(output, tuple) and output else output
            if before is None or not isinstance(y, Tensor) or y.grad_fn is None or y.shape != before[1]:
                return
            if _skip_path((y.grad_fn, y.output_nr), before[0]):
                self.residual[name] = len(output) if isinstance(output, tuple) else None

        return hook


def _follow_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The model's inputs, so that what is made of them can be followed."""
    return torch.utils._pytree.tree_map(_followed, (args, dict(kwargs)))


def _followed(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().requires_grad_(True).clone()  # a clone may be changed in place
    return leaf


def _skip_path(made: Made, x: Made) -> bool | None:
    """Whether x passes on to the tensor over a sum whose other side depends on it; None where it does not pass on."""
    if made[0] is x[0] and made[1] == x[1]:
        return False
    if made[0] is None:
        return None
    inputs = list(made[0].next_functions)
    if made[0].name() in PASSING:
        return _skip_path(inputs[0], x)
    if made[0].name() != SUM or len(inputs) != 2:
        return None
    reached = None
    for side, other in (inputs, inputs[::-1]):
        over = _skip_path(side, x)
        if over is not None:
            if over or _depends(other, x):
                return True
            reached = False
    return reached


def _depends(made: Made, x: Made) -> bool:
    waiting, seen = [made], set()
    while waiting:
        function, index = waiting.pop()
        if function is x[0] and index == x[1]:
            return True
        if function is not None and function not in seen:
            seen.add(function)
            waiting.extend(function.next_functions)
    return False
