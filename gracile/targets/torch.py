"""PyTorch itself: the traced program of `torch.export` in one file, run without the class that it came from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gracile.data import Batch, inputs_of
from gracile.errors import TargetError
from gracile.targets.base import Capabilities, Runner, Target
from gracile.targets.feeding import named_inputs, outputs_from
from gracile.targets.files import write_whole
from gracile.targets.onnxruntime import check_settings
from gracile.targets.tracing import (
    example_of_two,
    input_names,
    output_names,
    plain_copy,
    quiet,
    reason_of,
    trace_program,
)

logger = logging.getLogger(__name__)

_NAMES = "gracile.json"


@dataclass(frozen=True)
class PyTorch(Target):
    """PyTorch on the CPU in float32; quantized layers decode their weights at every call, which saves no time.

    threads: None leaves PyTorch's own number.
    """

    threads: int | None = None

    name: ClassVar[str] = "pytorch"  # type: ignore[misc]
    suffix: ClassVar[str] = ".pt2"  # type: ignore[misc]
    capabilities: ClassVar[Capabilities] = Capabilities(schemes=(), folds_batch_norm=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_settings(self, self.threads, "f32", self.capabilities.precisions)

    def available(self) -> str | None:
        """None: PyTorch is always here."""
        return None

    def export(
        self, model: nn.Module, example: Batch, path: str | Path, *, feed: Callable[[Batch], Any] | None = None
    ) -> Path:
        """Trace the model with `torch.export`, dynamic as in ONNX, and save the program."""
        plain, _ = plain_copy(model)
        args, kwargs = example_of_two(*inputs_of(plain, example, feed))
        outputs = output_names(plain, args, kwargs)
        program = _trace(_Positional(plain, list(kwargs)), (*args, *kwargs.values()))
        names = json.dumps({"inputs": input_names(plain, args, kwargs), "outputs": outputs})
        return write_whole(Path(path), lambda file: torch.export.save(program, file, extra_files={_NAMES: names}))

    def load(self, path: str | Path) -> Runner:
        """The program, ready to run."""
        return _TorchRunner(path, self.threads)


class _TorchRunner(Runner):
    def __init__(self, path: str | Path, threads: int | None) -> None:
        extra = {_NAMES: ""}
        try:
            with quiet():
                self._module = torch.export.load(str(path), extra_files=extra).module()
            names = json.loads(extra[_NAMES])
        except Exception as error:  # damage shows as zip, JSON, key or runtime errors
            raise TargetError(f"PyTorch cannot load {path}: {reason_of(error)}") from error
        self.inputs, self.outputs = names["inputs"], names["outputs"]
        self._threads = threads

    def __call__(self, batch: Batch) -> Any:
        """Outputs on one batch; TargetError where the program refuses it."""
        given = named_inputs(batch, self.inputs)
        try:
            with torch.inference_mode(), _threads(self._threads):
                leaves = self._module(*given.values())
        except Exception as error:
            raise TargetError(f"The exported program cannot run this batch: {reason_of(error)}") from error
        return outputs_from(self.outputs, leaves)


def _trace(model: _Positional, args: tuple[Any, ...]) -> Any:
    """The `ExportedProgram`; for the example's batch size only where the forward fixes it, with a warning logged."""
    name = type(model.model).__name__
    try:
        program, size = trace_program(model, args, {}, {"args": args})
    except Exception as error:  # the tracer raises whatever the forward does under it
        raise TargetError(
            f"{name} cannot be traced by torch.export: {reason_of(error)}\n"
            f"  Rewrite the part of its forward that it names."
        ) from error
    if size is not None:
        logger.warning("%s exports only for batches of %d: its code fixes the size.", name, size)
    return program


class _Positional(nn.Module):
    """A model called by position that returns its output tensors as a tuple: loading needs no class of theirs."""

    def __init__(self, model: nn.Module, keywords: list[str]) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        count = len(args) - len(self.keywords)
        outputs = self.model(*args[:count], **dict(zip(self.keywords, args[count:])))
        return tuple(leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
