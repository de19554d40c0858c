"""What exporters trace: a plain copy of the model, example inputs, names and varying dimensions of both ends."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import batch_size
from gracile.errors import GracileError, ModelError
from gracile.nn import QuantizedRecurrent, end_training


def plain_copy(model: nn.Module) -> tuple[nn.Module, list[QuantizedRecurrent]]:
    """A float32 copy on the CPU in evaluation mode, its weights encoded, without caches between calls.

    Recurrent layers have decoded weights in it, since runtimes are slow with weights that are no constants; the layers
    that they stand for come besides.
    """
    plain = copy.deepcopy(model).cpu().float().eval()
    end_training(plain)
    encoded = [module for module in plain.modules() if isinstance(module, QuantizedRecurrent)]
    floats = {id(layer): layer.to_float() for layer in encoded}
    for parent in list(plain.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in floats:
                setattr(parent, name, floats[id(child)])
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    config = getattr(plain, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
    return plain, encoded


def example_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of one doubled: tracing takes a dimension of size 1 for a constant."""
    if batch_size([args, kwargs]) != 1:
        return args, kwargs

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1 else leaf

    doubled: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_map(double, (args, kwargs))
    return doubled


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by parameter of `forward`."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the input tensors, positional ones first: parameters of `forward`, numbered where one holds several."""
    bound = bind(model, args, kwargs)
    positional = [name for name in bound if name not in kwargs][: len(args)]
    return _numbered([*zip(positional, args), *kwargs.items()])


def output_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the tensors that a call returns, in order; raises ModelError where the model does not run.

    "output" for a tensor; the keys of a mapping, with a number behind where one holds several; else output_0, ....
    """
    try:
        with torch.no_grad():
            outputs = model(*args, **kwargs)
    except GracileError:
        raise
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on the example: {error}") from error
    if isinstance(outputs, Tensor):
        return ["output"]
    if isinstance(outputs, Mapping):
        return _numbered([(str(key), value) for key, value in outputs.items()])
    return _numbered([("output", torch.utils._pytree.tree_leaves(outputs))])


def _numbered(items: list[tuple[str, Any]]) -> list[str]:
    """A name for each tensor in the values: the value's own name for one, with a number behind for several."""
    names: list[str] = []
    for name, value in items:
        count = sum(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value))
        names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return names


def dynamic_dimensions(inputs: Any, size: int) -> Any:
    """Which dimensions may vary, in the structure of the inputs.

    The first of every tensor that has the batch's size there, and the second of integer tokens [batch, length].
    """
    auto = torch.export.Dim.AUTO

    def of(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        varies = {0: auto} if leaf.ndim and leaf.shape[0] == size else {}
        if leaf.ndim == 2 and not leaf.is_floating_point() and leaf.shape[1] > 1:
            varies[1] = auto
        return varies

    return torch.utils._pytree.tree_map(of, inputs)


def trace_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any
) -> tuple[Any, int | None]:
    """The model as an `ExportedProgram`, and the one batch size that it is for, or None where any will do.

    inputs: args and kwargs by parameter of `forward`. Where the forward fixes the batch size, the program is for the
    example's: left to itself, the ONNX exporter keeps such a dimension open, drops the check, and the file computes
    something else for other sizes. Raises the tracer's error where nothing can be traced.
    """
    size = batch_size([args, kwargs])
    failure: Exception | None = None
    for shapes in (dynamic_dimensions(inputs, size), None):
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:  # the tracer raises whatever the forward does under it
            failure = failure or error
            continue
        if shapes is None:
            return program, size
        if _batch_varies(program, size):
            return program, None
    assert failure is not None
    raise failure


def _batch_varies(program: Any, size: int) -> bool:
    """Whether the first dimension is open in every input that had the batch's size there."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    firsts = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim]
    return not any(is_concrete_int(first) and int(first) == size for first in firsts)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, which speak of their own internals; levels and filters are restored after."""
    stems = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    known = [name for name in logging.root.manager.loggerDict if name.startswith(stems)]
    loggers = [logging.getLogger(name) for name in {*stems, *known}]
    levels = [found.level for found in loggers]
    try:
        for found in loggers:
            found.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for found, level in zip(loggers, levels):
            found.setLevel(level)


def reason_of(error: BaseException | None) -> str:
    """The first line of the deepest cause that says something."""
    said = ""
    while error is not None:
        lines = str(error).strip().splitlines()
        said = lines[0] if lines else said
        error = error.__cause__
    return said or "no reason given"
