"""What the output of a layer is added to: the stream of a residual block, seen as the model computes the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class _Reached(BaseException):
    """Raised once all that is wanted is there: the rest of the forward is not needed.

    No `Exception`, so that neither the model's own handlers nor ours take it for a failure.
    """


class _WatchSum(TorchDispatchMode):
    """Catches the other operand of the first sum that the output itself enters, of the same shape and unscaled."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.other: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.output is not None and func in _ADDITIONS and kwargs.get("alpha", 1) == 1:
            first, second = args[:2]
            if first is self.output or second is self.output:
                other = second if first is self.output else first
                if isinstance(other, Tensor) and other.shape == self.output.shape:
                    self.other = other.clone()
                    raise _Reached
        return func(*args, **kwargs)


@torch.no_grad()
def read_layer(
    model: nn.Module, layer: str, run: Callable[[nn.Module], Any], summed: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """(input of the layer, what the output of the module `summed` is added to) in one forward, stopped when both are
    known.

    run: feeds the model one batch. summed: the layer itself or the batch norm behind it; None where no sum is looked
    for. The second is None where the output reaches no sum as it is: through a scaling, say, or in a concatenation.
    """
    inputs: list[Tensor] = []
    watch = _WatchSum()

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        if summed is None:
            raise _Reached

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.output = output if isinstance(output, Tensor) else None

    handles = [model.get_submodule(layer).register_forward_pre_hook(on_input)]
    if summed is not None:
        handles.append(model.get_submodule(summed).register_forward_hook(on_output))
    try:
        if summed is None:
            run(model)
        else:
            with watch:
                run(model)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return inputs[0], watch.other


@torch.no_grad()
def watch_blocks(
    model: nn.Module, blocks: Sequence[str], run: Callable[[nn.Module], Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (what a residual block is given, what it returns), the first tensor of each, as they are called."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def on_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            found[name] = (x.clone(), (output[0] if isinstance(output, tuple) else output).clone())

        return on_output

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in blocks]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
