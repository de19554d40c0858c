"""A PyTorch model as one ONNX file: traced with dynamic batch, its quantized layers in the standard's own operators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracile.data import Batch, inputs_of
from gracile.errors import MissingExtraError, TargetError
from gracile.targets.files import write_whole
from gracile.targets.tracing import (
    bind,
    example_of_two,
    input_names,
    output_names,
    plain_copy,
    quiet,
    reason_of,
    trace_program,
)

logger = logging.getLogger(__name__)

#: The first with 4-bit integers and block-wise DequantizeLinear.
OPSET = 21
#: Above this the weights go into a second file: protocol buffers end at 2 GB.
SINGLE_FILE_LIMIT = 1_500_000_000
#: Metadata of the file that says which batch sizes it takes: "dynamic", or the one it was exported with.
BATCH_KEY = "gracile.batch"


def export_onnx(
    model: nn.Module,
    example: Batch,
    path: str | Path,
    *,
    feed: Callable[[Batch], Any] | None = None,
    extra: str,
    integer_lstms: bool = False,
) -> Path:
    """Write the model, in evaluation mode and float32, as ONNX, and return the file.

    The first dimension of every input that has the batch's size is dynamic, and the second of integer tokens [batch,
    length]; where tracing refuses that, all are fixed, with a warning in the log. Inputs are named as the parameters of
    `forward`, outputs as the keys of what it returns ("output" for a single tensor). The model given is not changed.
    Raises TargetError with the exporter's reason. extra: what to install where the exporter is absent. integer_lstms:
    whether the runtime has an LSTM that rounds inputs and states as they come, for the layers that do.
    """
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, extra, "Exporting to ONNX") from error
    from gracile.targets.qdq import to_standard
    from gracile.targets.qdq_lstm import write_lstms

    plain, recurrent = plain_copy(model)
    args, kwargs = example_of_two(*inputs_of(plain, example, feed))
    names = output_names(plain, args, kwargs)
    program, batch = _trace(plain, args, kwargs)
    to_standard(program)
    if integer_lstms:
        write_lstms(program, recurrent)
    _strip(program)
    _name_ends(program.graph, input_names(plain, args, kwargs), names)
    program.metadata_props[BATCH_KEY] = batch
    return _write(program, Path(path))


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The exporter's model (`onnx_ir.Model`), and which batch sizes it takes."""
    from gracile.targets.translate import translations

    name = type(model).__name__
    try:
        traced, size = trace_program(model, args, kwargs, bind(model, args, kwargs))
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                traced, opset_version=OPSET, custom_translation_table=translations(), verbose=False
            )
    except Exception as error:  # the exporter raises whatever its many parts raise
        raise TargetError(
            f"{name} cannot be exported to ONNX: {reason_of(error)}\n"
            f"  PyTorch's exporter traces the forward; rewrite the part it names, or use the PyTorch target."
        ) from error
    if size is None:
        return program.model, "dynamic"
    logger.warning("%s exports only for batches of %d: its code fixes the size.", name, size)
    return program.model, str(size)


def _name_ends(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Name the graph's inputs and outputs. What goes straight through, or comes out twice, passes an Identity first."""
    import onnx_ir as ir

    taken = {id(value) for value in graph.inputs}
    for index, value in enumerate(graph.outputs):
        if id(value) in taken or value.is_initializer():
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[index] = identity.outputs[0]
        taken.add(id(graph.outputs[index]))
    ends = [*zip(graph.inputs, inputs), *zip(graph.outputs, outputs)]
    for index, (value, _) in enumerate(ends):  # first out of the way, since an output may bear an input's new name
        value.name = f"end_{index}"
    for value, name in ends:
        value.name = name


def _strip(model: Any) -> None:
    """Drop what only a debugger reads, and tensors that rewriting left without a reader."""
    graph = model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]


def _write(model: Any, path: Path) -> Path:
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if size > SINGLE_FILE_LIMIT else None
    return write_whole(path, lambda temporary: ir.save(model, temporary, external_data=external))
