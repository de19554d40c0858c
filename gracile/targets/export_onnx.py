"""A PyTorch model as one ONNX file: traced with dynamic batch, its quantized layers in the standard's own operators."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, batch_size, inputs_of
from gracile.errors import GracileError, MissingExtraError, ModelError, TargetError
from gracile.nn import end_training

logger = logging.getLogger(__name__)

#: The first with 4-bit integers and block-wise DequantizeLinear.
OPSET = 21
#: Above this the weights go into a second file: protocol buffers end at 2 GB.
SINGLE_FILE_LIMIT = 1_500_000_000
#: Metadata of the file that says which batch sizes it takes: "dynamic", or the one it was exported with.
BATCH_KEY = "gracile.batch"


def export_onnx(
    model: nn.Module, example: Batch, path: str | Path, *, feed: Callable[[Batch], Any] | None = None, extra: str
) -> Path:
    """Write the model, in evaluation mode and float32, as ONNX, and return the file.

    The first dimension of every input that has the batch's size is dynamic, and the second of integer tokens [batch,
    length]; where tracing refuses that, all are fixed, with a warning in the log. Inputs are named as the parameters of
    `forward`, outputs as the keys of what it returns ("output" for a single tensor). The model given is not changed.
    Raises TargetError with the exporter's reason. extra: what to install where the exporter is absent.
    """
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, extra, "Exporting to ONNX") from error
    from gracile.targets.qdq import to_standard

    plain = _plain_copy(model)
    args, kwargs = _example_of_two(*inputs_of(plain, example, feed))
    names = _output_names(plain, args, kwargs)
    program, batch = _trace(plain, args, kwargs)
    graph = program.model.graph
    if len(names) != len(graph.outputs):
        names = [f"output_{i}" for i in range(len(graph.outputs))]
    to_standard(program.model)
    for value, name in zip(graph.outputs, names):
        value.name = name
    program.model.metadata_props[BATCH_KEY] = batch
    return _write(program.model, Path(path))


def _plain_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode, its weights encoded, without caches between calls."""
    plain = copy.deepcopy(model).cpu().float().eval()
    end_training(plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    config = getattr(plain, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
    return plain


def _example_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of one doubled: tracing takes a dimension of size 1 for a constant."""
    if batch_size([args, kwargs]) != 1:
        return args, kwargs

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1 else leaf

    return torch.utils._pytree.tree_map(double, (args, kwargs))


def _output_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the tensors a call returns, in order; raises ModelError where the model does not run."""
    try:
        with torch.no_grad():
            outputs = model(*args, **kwargs)
    except GracileError:
        raise
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on the example: {error}") from error
    if isinstance(outputs, Tensor):
        return ["output"]
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(torch.utils._pytree.tree_leaves(outputs))
    names: list[str] = []
    for key, value in items:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        name = key if isinstance(key, str) else f"output_{key}"
        names += [name] if len(leaves) == 1 else [f"{name}_{i}" for i in range(len(leaves))]
    return names


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The exporter's program, and which batch sizes it takes."""
    from gracile.targets.translate import translations

    size = batch_size([args, kwargs])
    failure: Exception | None = None
    for dynamic in (True, False):
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamo=True,
                    dynamic_shapes=_dynamic(model, args, kwargs, size) if dynamic else None,
                    opset_version=OPSET,
                    custom_translation_table=translations(),
                    verbose=False,
                )
        except Exception as error:
            failure = failure or error
            continue
        assert program is not None
        if dynamic and not isinstance(program.model.graph.inputs[0].shape[0], int):
            return program, "dynamic"
        logger.warning("%s exports only for batches of %d: its code fixes the size.", type(model).__name__, size)
        return program, str(size)
    reason = str(failure.__cause__ or failure).strip().splitlines()
    raise TargetError(
        f"{type(model).__name__} cannot be exported to ONNX: {reason[0] if reason else type(failure).__name__}\n"
        f"  PyTorch's exporter traces the forward; rewrite the part it names, or use the PyTorch target."
    ) from failure


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> dict[str, Any]:
    """Which dimensions may vary, by parameter of `forward`."""
    import inspect

    auto = torch.export.Dim.AUTO

    def of(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        varies = {0: auto} if leaf.ndim and leaf.shape[0] == size else {}
        if leaf.ndim == 2 and not leaf.is_floating_point() and leaf.shape[1] > 1:
            varies[1] = auto
        return varies

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: torch.utils._pytree.tree_map(of, value) for name, value in bound.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which speak of its internals; levels and filters are restored after."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    loggers += [
        found
        for name, found in logging.root.manager.loggerDict.items()
        if isinstance(found, logging.Logger) and name.startswith(("torch.onnx", "onnxscript", "onnx_ir"))
    ]
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


def _write(model: Any, path: Path) -> Path:
    """Write to a temporary file beside the final one, then rename: what stands under the name is always whole."""
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if weights > SINGLE_FILE_LIMIT else None
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        ir.save(model, temporary, external_data=external)
        os.replace(temporary, path)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error}.\n  Free some space or choose another path.") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return path
