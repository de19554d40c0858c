"""OpenVINO on the CPU, from the same ONNX file: at forced float32, or at the precision it prefers on this processor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from gracile.data import Batch
from gracile.errors import MissingExtraError, TargetError
from gracile.targets.base import INTEGER_SCHEMES, Capabilities, Runner, Target
from gracile.targets.export_onnx import export_onnx
from gracile.targets.feeding import feeds_of, outputs_of
from gracile.targets.onnxruntime import check_settings

#: How many input shapes stay compiled.
COMPILED_SHAPES = 8


@dataclass(frozen=True)
class OpenVINO(Target):
    """OpenVINO's CPU plug-in.

    threads: None lets it take all cores.
    precision: of float operators: "f32" forced; "default", as the runtime runs it when not told (bf16 where the
        processor has it, and inputs of layers with 4- or 8-bit weights rounded to int8 as they come); "bf16" forced.
    """

    threads: int | None = None
    precision: str = "f32"

    name: ClassVar[str] = "openvino"  # type: ignore[misc]
    suffix: ClassVar[str] = ".onnx"  # type: ignore[misc]
    capabilities: ClassVar[Capabilities] = Capabilities(  # type: ignore[misc]
        schemes=INTEGER_SCHEMES, precisions=("f32", "default", "bf16")
    )

    def __post_init__(self) -> None:
        check_settings(self, self.threads, self.precision, self.capabilities.precisions)

    def available(self) -> str | None:
        """None where OpenVINO is installed; else what to install."""
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"OpenVINO is not installed ({error}): pip install 'gracile[openvino]'"
        return None

    def export(
        self, model: nn.Module, example: Batch, path: str | Path, *, feed: Callable[[Batch], Any] | None = None
    ) -> Path:
        """Write the model as ONNX; see `export_onnx`."""
        return export_onnx(model, example, path, feed=feed, extra="openvino")

    def load(self, path: str | Path) -> OpenVINORunner:
        """The model, compiled for the shape of each batch when it first comes."""
        return OpenVINORunner(path, self.threads, self.precision)


class OpenVINORunner(Runner):
    """A model compiled once for each shape that it is run with: static shapes run faster than dynamic ones."""

    def __init__(self, path: str | Path, threads: int | None, precision: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError("openvino", "openvino", "Running in OpenVINO") from error
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(str(path))
        except Exception as error:
            raise TargetError(f"OpenVINO cannot load {path}: {str(error).strip().splitlines()[-1]}") from error
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        if precision != "default":
            self._settings["INFERENCE_PRECISION_HINT"] = precision
        if precision == "f32":
            self._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self.inputs = [value.get_any_name() for value in self._model.inputs]
        self.outputs = [value.get_any_name() for value in self._model.outputs]
        self._dtypes = [np.dtype(value.get_element_type().to_dtype()) for value in self._model.inputs]
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()

    def __call__(self, batch: Batch) -> Any:
        """Outputs on one batch; TargetError with the runtime's reason where it refuses it."""
        feeds = feeds_of(batch, self.inputs, self._dtypes)
        try:
            request = self._request(tuple(array.shape for array in feeds.values()))
            results = request.infer(list(feeds.values()), share_inputs=True)
            return outputs_of(self.outputs, [np.array(results[i]) for i in range(len(self.outputs))])
        except Exception as error:
            raise TargetError(f"OpenVINO cannot run this batch: {str(error).strip().splitlines()[-1]}") from error

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        if shapes in self._compiled:
            self._compiled.move_to_end(shapes)
            return self._compiled[shapes]
        model = self._model
        if any(value.get_partial_shape().is_dynamic for value in model.inputs):
            model = model.clone()
            model.reshape(dict(zip(range(len(shapes)), map(list, shapes))))
        request = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        self._compiled[shapes] = request
        if len(self._compiled) > COMPILED_SHAPES:
            self._compiled.popitem(last=False)
        return request
