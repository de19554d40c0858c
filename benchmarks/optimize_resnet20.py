"""`optimize` on the CIFAR-10 ResNet-20 of `resnet20_akamaster`: speed against the float runtimes, accuracy on test5k.

Calibration, training and the choice among candidates use images of `train20k` only: 2,000 of them, flipped and shifted
once, judge candidates and are never trained on. `test5k` is read once, for the model that was chosen. At the end the
original in both runtimes and all their precisions, and the result, are timed in turn in one process.

    python -m benchmarks.optimize_resnet20 --target openvino --run-dir runs/resnet20
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import gracile as gc
from benchmarks.datasets import augment, augmented_loader, batches, cifar10
from benchmarks.models import resnet20_akamaster
from gracile.evaluate.quality import compare
from gracile.measure import Subject, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("onnxruntime", "openvino"), default="openvino")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    images, labels = cifar10("train20k")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    held, fitted = order[:2000], order[2000:]
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        judged = batches(augment(images[held]), labels[held], 32)
    data = gc.Data(
        calibration=[images[part] for part in fitted[:1024].split(32)],
        train=augmented_loader(images[fitted], labels[fitted]),
        evaluation=judged,
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )
    target = {"onnxruntime": gc.OnnxRuntime(), "openvino": gc.OpenVINO()}[args.target]
    goal = gc.Goal(target=target, max_drop=0.01, epochs=args.epochs, minutes=args.minutes, batch_size=32)
    model = resnet20_akamaster()

    def show(progress: gc.Progress) -> None:
        if progress.done == progress.total:
            print(f"{time.perf_counter() - start:7.0f} s  {progress.phase} {progress.note}", flush=True)

    result = gc.optimize(model, data, goal, seed=args.seed, run_dir=args.run_dir, on_progress=show)
    seconds = time.perf_counter() - start
    print(result.report)
    result.save(args.run_dir.with_name(args.run_dir.name + "-result"))
    print(json.dumps({"seconds": seconds, "met": result.met}))
    final(model, result, target, args.run_dir / "final")


def final(model: torch.nn.Module, result: gc.Result, target: gc.targets.Target, folder: Path) -> None:
    """Accuracy on test5k and latency of every runtime, interleaved."""
    precision = result.report.after[0].precision
    precisions = [p for p in target.capabilities.precisions if p in ("f32", "default")]
    subjects = [Subject(f"result {p}", result.model, replace(target, precision=p)) for p in precisions]
    for runtime in (gc.OnnxRuntime(), gc.OpenVINO(), gc.OpenVINO(precision="default")):
        subjects.append(Subject(f"original {runtime.name} {runtime.precision}", model, runtime))
    test = gc.Data(evaluation=batches(*cifar10("test5k"), 32), metric=gc.metrics.accuracy)
    found = measure(subjects, test, folder, batch_sizes=(32, 1), seconds=20)
    for item in found:
        for m in item.measurements:
            row = {"subject": item.subject.label, "batch": m.batch_size, "p50_ms": m.latency_p50_ms}
            row |= {"p95_ms": m.latency_p95_ms, "accuracy": m.quality and m.quality["value"], "macs": m.macs}
            print(json.dumps(row | {"bytes": m.file_bytes, "instruction_set": m.instruction_set}))
    original = next(item for item in found if item.subject.label == "original onnxruntime f32")
    assert original.values is not None
    for item in found[: len(precisions)]:
        assert item.values is not None
        print(item.subject.label, compare(gc.metrics.accuracy, original.values, item.values, max_drop=0.01).verdict)
    print(f"precision chosen: {precision}")


if __name__ == "__main__":
    main()
