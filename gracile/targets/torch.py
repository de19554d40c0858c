"""PyTorch itself: the traced program of `torch.export` in one file, run without the class that it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gracile.data import Batch, batch_size, inputs_of
from gracile.errors import TargetError
from gracile.targets.base import Capabilities, Runner, Target
from gracile.targets.feeding import named_inputs, outputs_from
from gracile.targets.files import write_whole
from gracile.targets.onnxruntime import check_settings
from gracile.targets.tracing import bind, dynamic_dimensions, example_of_two, output_names, plain_copy, quiet, reason_of

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
        plain = plain_copy(model)
        args, kwargs = example_of_two(*inputs_of(plain, example, feed))
        outputs = output_names(plain, args, kwargs)
        inputs = list(bind(plain, args, kwargs))
        shapes = dynamic_dimensions({"args": args, "kwargs": kwargs}, batch_size([args, kwargs]))
        program = _trace(plain, args, kwargs, shapes)
        names = json.dumps({"inputs": inputs, "keywords": list(kwargs), "outputs": outputs})
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
        self._keywords, self._threads = names["keywords"], threads

    def __call__(self, batch: Batch) -> Any:
        """Outputs on one batch; TargetError where the program refuses it."""
        given = named_inputs(batch, self.inputs)
        keywords = {name: given.pop(name) for name in self._keywords}
        try:
            with torch.inference_mode(), _threads(self._threads):
                leaves = self._module(*given.values(), **keywords)
        except Exception as error:
            raise TargetError(f"The exported program cannot run this batch: {reason_of(error)}") from error
        return outputs_from(self.outputs, leaves)


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> torch.export.ExportedProgram:
    """The `ExportedProgram`, dynamic if that can be traced; else for the example's shapes."""
    failure: Exception | None = None
    for shapes in (dynamic, None):
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(_Leaves(model), args, kwargs, dynamic_shapes=shapes)
        except Exception as error:  # the tracer raises whatever the forward does under it
            failure = failure or error
    raise TargetError(
        f"{type(model).__name__} cannot be traced by torch.export: {reason_of(failure)}\n"
        f"  Rewrite the part of its forward that it names."
    ) from failure


class _Leaves(nn.Module):
    """A model that returns its output tensors as a tuple: loading needs none of the classes it wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        leaves = torch.utils._pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


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
