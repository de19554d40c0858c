"""int8 beside ONNX Runtime's static quantizer, neural-compressor and NNCF: same model, same calibration data.

All files are judged on the same test data on the runtime that serves them and timed in turn in one process. Peers use
their documented settings for the kind of model (per-channel weights; NNCF's mixed preset, transformer type for MiniLM;
neural-compressor's SmoothQuant for MiniLM), and so do we (for MiniLM min-max ranges and SmoothQuant, which is also what
`optimize` plans for it). A peer that cannot take a model has a row that says so.

    python -m benchmarks.int8_peers TASK --folder runs/int8 [--seed 0] [--seconds 60] [--time-only]

TASK: resnet20, resnet32, separable, mobilenet, gru, minilm. --time-only times the files that the folder holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gracile as gc
from benchmarks.int8_tasks import TASKS, Task
from gracile.data import Batch
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.evaluate.quality import compare
from gracile.measure import resize_batch

LAYERS = ["Conv", "Gemm", "MatMul"]


def named_inputs(batch: Batch, names: list[str]) -> dict[str, Any]:
    """The batch as arrays by input name."""
    values = list(batch.values()) if isinstance(batch, dict) else [batch]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


class Reader:
    """The calibration batches as both ONNX quantizers read them."""

    def __init__(self, source: Path, task: Task) -> None:
        import onnxruntime as ort

        session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        self.names = [item.name for item in session.get_inputs()]
        self.task = task
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self.batches = iter(self.task.calibration)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else named_inputs(batch, self.names)


def onnxruntime_static(source: Path, path: Path, task: Task, operators: list[str] | None = None) -> None:
    """`quantize_static` of ONNX Runtime after its own pre-processing; per channel, QDQ, its default calibration.

    operators: the types it quantizes; None: all that it can.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class OrtReader(Reader, CalibrationDataReader):  # type: ignore[misc]
        pass

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        OrtReader(source, task),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=operators,
    )


def neural_compressor_static(source: Path, path: Path, task: Task) -> None:
    """`quantize` of onnx-neural-compressor: per channel, QDQ; SmoothQuant for a transformer."""
    from onnx_neural_compressor.quantization import QuantFormat, config, quantize

    settings = config.StaticQuantConfig(
        calibration_data_reader=Reader(source, task),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        extra_options={"SmoothQuant": True} if task.transformer else None,
        calibration_sampling_size=len(task.calibration),
    )
    quantize(str(source), str(path), settings)


def nncf_static(source: Path, path: Path, task: Task) -> None:
    """Post-training quantization of NNCF on the same float ONNX file, read by OpenVINO."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source)
    names = [port.get_any_name() for port in model.inputs]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(task.calibration, lambda batch: named_inputs(batch, names)),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if task.transformer else None,
        subset_size=len(task.calibration),
    )
    ov.save_model(quantized, path, compress_to_fp16=False)


PEERS: dict[str, tuple[str, Callable[[Path, Path, Task], None]]] = {
    "onnxruntime quantizer": ("onnxruntime.onnx", onnxruntime_static),
    "onnxruntime quantizer, layers only": ("layers.onnx", partial(onnxruntime_static, operators=LAYERS)),
    "neural-compressor": ("neural_compressor.onnx", neural_compressor_static),
    "nncf": ("nncf.xml", nncf_static),
}


def write(task: Task, folder: Path, seed: int) -> None:
    """The float file, ours and each peer's, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    result = gc.compress(task.model, task.step, gc.Data(calibration=task.calibration), seed=seed)
    example = task.calibration[0]
    for target, suffix in ((gc.OnnxRuntime(), "onnx"), (gc.OpenVINO(), "xml")):
        target.export(task.model, example, folder / f"float.{suffix}")
        target.export(result.model, example, folder / f"gracile.{suffix}")
    for name, (file, quantize) in PEERS.items():
        try:
            quantize(folder / "float.onnx", folder / file, task)
        except Exception as error:  # whatever a peer fails with is its result
            print(json.dumps({"file": name, "failed": f"{type(error).__name__}: {error}"[:300]}), flush=True)


def load(folder: Path) -> dict[str, Any]:
    """What runs each file that the folder holds, by tool and runtime."""
    files = {"float": "float", "gracile": "gracile"} | {name: file for name, (file, _) in PEERS.items()}
    targets = {
        "onnxruntime f32": (".onnx", gc.OnnxRuntime()),
        "openvino f32": (".xml", gc.OpenVINO()),
        "openvino default": (".xml", gc.OpenVINO(precision="default")),
    }
    runners = {}
    for runtime, (suffix, target) in targets.items():
        for name, file in files.items():
            path = folder / (file if "." in file else file + suffix)
            if path.suffix == suffix and path.is_file():
                runners[f"{name}: {runtime}"] = target.load(path)
    return runners


def judge(task: Task, runners: dict[str, Any]) -> None:
    """Print the quality of each, what it lost to the float model, and what ours lost to it on the same runtime."""
    reference = task.evaluate(lambda batch: task.model(**batch) if isinstance(batch, dict) else task.model(batch))
    values = {name: task.evaluate(runner) for name, runner in runners.items()}
    for name, found in values.items():
        lost = compare(task.metric, reference, found, max_drop=0.01)
        behind = compare(task.metric, found, values[f"gracile: {name.split(': ')[1]}"], max_drop=0.01)
        row = {"file": name, "quality": lost.after, "drop": lost.drop, "low": lost.low, "high": lost.high}
        row |= {"gracile_behind": behind.drop, "behind_low": behind.low, "behind_high": behind.high}
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def time(task: Task, runners: dict[str, Any], seconds: float) -> None:
    """Print the latency of each, in turns."""
    for size in (32, 1):
        batch = resize_batch(task.calibration[0], size)
        calls = {name: partial(runner, batch) for name, runner in runners.items()}
        for name, latency in measure_latency(calls, seconds=seconds, rounds=1000).items():
            row = {"file": name, "batch": size, "p50_ms": round(latency.p50_ms, 4), "p95_ms": round(latency.p95_ms, 4)}
            print(json.dumps(row | {"samples": latency.samples, "instruction_set": instruction_set()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each batch size; 0: none")
    parser.add_argument("--time-only", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task, folder = TASKS[args.task](args.seed), args.folder / args.task
    if not args.time_only:
        write(task, folder, args.seed)
    runners = load(folder)
    if not args.time_only:
        judge(task, runners)
    if args.seconds > 0:
        time(task, runners, args.seconds)


if __name__ == "__main__":
    main()
