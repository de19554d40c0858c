"""int8 of ResNet-32 and MiniLM beside ONNX Runtime's static quantizer and NNCF: same model, same calibration data.

All files are judged on the same test data on the runtime that serves them and timed in turn in one process. Peers use
their documented settings for the kind of model (per-channel weights; NNCF's mixed preset, transformer type for MiniLM),
and so do we (for MiniLM min-max ranges and SmoothQuant, which is also what `optimize` plans for it).

    python -m benchmarks.int8_peers resnet32|minilm --folder runs/int8 [--seed 0] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gracile as gc
from benchmarks import sentences
from benchmarks.datasets import batches, cifar10
from benchmarks.models import resnet32_akamaster
from gracile.data import Batch
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.evaluate.quality import Values, collect, compare
from gracile.measure import resize_batch


@dataclass(frozen=True)
class Task:
    """calibration: batches of inputs. evaluate: per-example values of the metric of a predictor."""

    model: nn.Module
    calibration: list[Batch]
    metric: Any
    evaluate: Callable[[Callable[[Batch], Any]], Values]
    transformer: bool


def resnet32(seed: int) -> Task:
    """ResNet-32 on CIFAR-10: 512 training images calibrate, test5k judges."""
    images, _ = cifar10("train20k")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:512]
    test = batches(*cifar10("test5k"), 32)
    return Task(
        resnet32_akamaster(),
        list(images[chosen].split(32)),
        gc.metrics.accuracy,
        lambda predict: collect(lambda batch: predict(batch[0]), test, gc.metrics.accuracy),
        transformer=False,
    )


def minilm(seed: int) -> Task:
    """MiniLM on the STS benchmark: 512 training sentences calibrate, the test pairs judge by Spearman."""
    first, second, _ = sentences.sts("train")
    texts = [*first, *second]
    chosen = np.random.default_rng(seed).permutation(len(texts))[:512]
    calibration = sentences.tokenize([texts[i] for i in chosen], 32)
    first, second, gold = sentences.sts("test")
    test = sentences.tokenize([*first, *second], 32)

    def evaluate(predict: Callable[[Batch], Any]) -> Values:
        with torch.no_grad():
            vectors = torch.cat([predict(batch) for batch in test])
        return np.stack([sentences.similarities(vectors).double().numpy(), gold], axis=1)

    return Task(sentences.minilm(), calibration, gc.metrics.Spearman(), evaluate, transformer=True)


def named_inputs(batch: Batch, names: list[str]) -> dict[str, Any]:
    """The batch as arrays by input name."""
    values = list(batch.values()) if isinstance(batch, dict) else [batch]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def onnxruntime_static(source: Path, path: Path, task: Task, operators: list[str] | None = None) -> Path:
    """`quantize_static` of ONNX Runtime after its own pre-processing; per channel, QDQ, its default calibration.

    operators: the types it quantizes; None: all that it can.
    """
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [item.name for item in ort.InferenceSession(source, providers=["CPUExecutionProvider"]).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(task.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else named_inputs(batch, names)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=operators,
    )
    return path


def nncf_static(source: Path, path: Path, task: Task) -> Path:
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
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("resnet32", "minilm"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    task = {"resnet32": resnet32, "minilm": minilm}[args.task](args.seed)
    data = gc.Data(calibration=task.calibration)
    step = gc.Quantize(gc.W8A8)
    if task.transformer:
        step = gc.Quantize(gc.W8A8, ranges=gc.ranges.MinMax(), equalize=gc.equalize.SmoothQuant())
    quantized = gc.compress(task.model, step, data, seed=args.seed).model
    example = task.calibration[0]
    ort, vino, free = gc.OnnxRuntime(), gc.OpenVINO(), gc.OpenVINO(precision="default")
    source = ort.export(task.model, example, args.folder / "float.onnx")
    ours = ort.export(quantized, example, args.folder / "gracile.onnx")
    ours_vino = vino.export(quantized, example, args.folder / "gracile.xml")
    static = onnxruntime_static(source, args.folder / "onnxruntime.onnx", task)
    only = onnxruntime_static(source, args.folder / "onnxruntime_layers.onnx", task, ["Conv", "Gemm", "MatMul"])
    by_nncf = nncf_static(source, args.folder / "nncf.xml", task)
    float_vino = vino.export(task.model, example, args.folder / "float.xml")
    runners = {
        "float: onnxruntime f32": ort.load(source),
        "gracile: onnxruntime f32": ort.load(ours),
        "onnxruntime quantizer: onnxruntime f32": ort.load(static),
        "onnxruntime quantizer, Conv/Gemm/MatMul only: onnxruntime f32": ort.load(only),
        "float: openvino f32": vino.load(float_vino),
        "gracile: openvino f32": vino.load(ours_vino),
        "nncf: openvino f32": vino.load(by_nncf),
        "float: openvino default": free.load(float_vino),
        "gracile: openvino default": free.load(ours_vino),
        "nncf: openvino default": free.load(by_nncf),
    }
    reference = task.evaluate(lambda batch: task.model(**batch) if isinstance(batch, dict) else task.model(batch))
    values = {name: task.evaluate(runner) for name, runner in runners.items()}
    for name, found in values.items():
        served = name.split(": ")[1]
        lost = compare(task.metric, reference, found, max_drop=0.01)
        behind = compare(task.metric, found, values[f"gracile: {served}"], max_drop=0.01)
        row = {"file": name, "quality": lost.after, "drop": lost.drop, "low": lost.low, "high": lost.high}
        row |= {"gracile_behind": behind.drop, "behind_low": behind.low, "behind_high": behind.high}
        print(json.dumps(row), flush=True)
    for size in (32, 1):
        batch = resize_batch(example, size)
        calls = {name: partial(runner, batch) for name, runner in runners.items()}
        for name, latency in measure_latency(calls, seconds=args.seconds, rounds=1000).items():
            row = {"file": name, "batch": size, "p50_ms": latency.p50_ms, "p95_ms": latency.p95_ms}
            print(json.dumps(row | {"samples": latency.samples, "instruction_set": instruction_set()}), flush=True)


if __name__ == "__main__":
    main()
