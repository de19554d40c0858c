"""What the output of a layer is added to: the stream of a residual block, seen as the model computes the sum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class Reached(BaseException):
    """Raised once all that is wanted is there: the rest of the forward is not needed.

    No `Exception`, so that neither the model's own handlers nor ours take it for a failure.
    """


class WatchSums(TorchDispatchMode):
    """Hands over the other operand of the first sum that an awaited tensor itself enters, of its shape and unscaled."""

    def __init__(self) -> None:
        super().__init__()
        self._awaited: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def wait(self, output: Any, found: Callable[[Tensor], None]) -> None:
        """Call `found` with what this tensor is added to, when it is; what is no tensor is not awaited."""
        if isinstance(output, Tensor):
            self._awaited.append((output, found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._awaited and func in _ADDITIONS and kwargs.get("alpha", 1) == 1:
            for i, (output, found) in enumerate(self._awaited):
                if any(operand is output for operand in args[:2]):
                    other = args[1] if args[0] is output else args[0]
                    if isinstance(other, Tensor) and other.shape == output.shape:
                        del self._awaited[i]
                        found(other)
                    break
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
    streams: list[Tensor] = []
    watch = WatchSums()

    def on_stream(stream: Tensor) -> None:
        streams.append(stream.clone())
        raise Reached

    inputs = _read(model, [layer], run, None if summed is None else (watch, summed, on_stream))
    return inputs[layer], streams[0] if streams else None


@torch.no_grad()
def read_inputs(model: nn.Module, layers: Iterable[str], run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Layer -> its input, in one forward that is stopped when all are known."""
    return _read(model, list(layers), run, None)


def _read(
    model: nn.Module,
    layers: list[str],
    run: Callable[[nn.Module], Any],
    then: tuple[WatchSums, str, Callable[[Tensor], None]] | None,
) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    handles = []
    for name in layers:

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            inputs[name] = given.clone() if len(layers) > 1 else given  # later operators may write into it
            if then is None and len(inputs) == len(layers):
                raise Reached

        handles.append(model.get_submodule(name).register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        if then is None:
            run(model)
        else:
            watch, summed, found = then
            handles.append(
                model.get_submodule(summed).register_forward_hook(lambda _module, _args, y: watch.wait(y, found))
            )
            with watch:
                run(model)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def read_call(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(arguments, keyword arguments, output) of the first call of a module in a forward, which ends there.

    run: feeds the model one batch. Nothing is copied: what is kept must not be written into.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((args, kwargs, output))
        raise Reached

    handle = module.register_forward_hook(on_call, with_kwargs=True)
    try:
        with contextlib.suppress(Reached):
            run()
    finally:
        handle.remove()
    return found[0]


def stream_of(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """(what a residual block is given, what it returns) in one call: the first tensor in, and its first result."""
    entered = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    return entered, output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def watch_blocks(
    model: nn.Module, blocks: Sequence[str], run: Callable[[nn.Module], Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> copies of what a residual block is given and what it returns (`stream_of`), as they are called."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def on_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entered, left = stream_of(args, kwargs, output)
            found[name] = (entered.clone(), left.clone())

        return on_output

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in blocks]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
