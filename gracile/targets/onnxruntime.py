"""ONNX Runtime on the CPU: int8 layers through QDQ, 4- and 8-bit weights through MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from gracile.data import Batch
from gracile.errors import ConfigError, MissingExtraError, TargetError
from gracile.targets.base import INTEGER_SCHEMES, Capabilities, Runner, Target
from gracile.targets.export_onnx import export_onnx
from gracile.targets.feeding import feeds_of, outputs_of

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """ONNX Runtime's CPU provider.

    threads: None lets it take all physical cores.
    precision: "f32": layers with 4- or 8-bit weights and float inputs compute in float32; "default": as the runtime
        does when not told, which rounds their inputs to int8 as they come. All other layers are the same in both.
    """

    threads: int | None = None
    precision: str = "f32"

    name: ClassVar[str] = "onnxruntime"  # type: ignore[misc]
    suffix: ClassVar[str] = ".onnx"  # type: ignore[misc]
    capabilities: ClassVar[Capabilities] = Capabilities(  # type: ignore[misc]
        schemes=(*INTEGER_SCHEMES, "W8A8-dynamic", "W7A8-dynamic"),
        precisions=("f32", "default"),
        integer_lstms=True,
    )

    def __post_init__(self) -> None:
        check_settings(self, self.threads, self.precision, self.capabilities.precisions)

    def available(self) -> str | None:
        """None where ONNX Runtime is installed; else what to install."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"ONNX Runtime is not installed ({error}): pip install 'gracile[onnxruntime]'"
        return None

    def export(
        self, model: nn.Module, example: Batch, path: str | Path, *, feed: Callable[[Batch], Any] | None = None
    ) -> Path:
        """Write the model as ONNX; see `export_onnx`."""
        lstms = self.capabilities.integer_lstms
        return export_onnx(model, example, path, feed=feed, extra="onnxruntime", integer_lstms=lstms)

    def load(self, path: str | Path) -> OnnxRuntimeRunner:
        """A session on the file."""
        return OnnxRuntimeRunner(path, self.threads, self.precision)


class OnnxRuntimeRunner(Runner):
    """One inference session."""

    def __init__(
        self, path: str | Path, threads: int | None, precision: str = "f32", optimized: str | Path | None = None
    ) -> None:
        """optimized: where to write the graph as the runtime executes it; None: nowhere."""
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnxruntime", "Running in ONNX Runtime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if precision == "f32":
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises a class of its own for each kind of damage
            raise TargetError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
        inputs = self._session.get_inputs()
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._dtypes = [np.dtype(_TYPES.get(value.type, np.float32)) for value in inputs]

    def __call__(self, batch: Batch) -> Any:
        """Outputs on one batch; TargetError with the runtime's reason where it refuses it."""
        feeds = feeds_of(batch, self.inputs, self._dtypes)
        try:
            return outputs_of(self.outputs, self._session.run(None, feeds))
        except Exception as error:
            raise TargetError(f"ONNX Runtime cannot run this batch: {str(error).splitlines()[0]}") from error


def check_settings(target: Target, threads: int | None, precision: str, precisions: tuple[str, ...]) -> None:
    """Raise ConfigError for a number of threads below 1 or a precision that the runtime has not."""
    kind = type(target).__name__
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"{kind}(threads={threads!r}): threads is a whole number from 1, or None for all cores.")
    if precision not in precisions:
        raise ConfigError(f"{kind}(precision={precision!r}): use one of {', '.join(map(repr, precisions))}.")
