"""Which layers may stay in floating point: formats within a budget of latency, beside integers everywhere.

    python -m benchmarks.format_latency [resnet20_akamaster] [--target openvino] [--amounts 0.8 0.5] [--seed 0]

W8A8 or floating point for each layer, calibrated on augmented images of train20k; test5k only judges. kl: of the float
model's answers there to the model's. Latency is of a batch of 64, as the step measured it beside the float model.
"""

from __future__ import annotations

import argparse
import json
import time

import gracile as gc
from benchmarks.datasets import calibration_batches, cifar10
from benchmarks.models import accuracy
from benchmarks.stored_formats import outputs
from benchmarks.structured import MODELS
from gracile.environment import instruction_set
from gracile.stats.match import divergence

TARGETS = {"openvino": gc.OpenVINO, "onnxruntime": gc.OnnxRuntime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="resnet20_akamaster")
    parser.add_argument("--target", choices=TARGETS, default="openvino")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.8, 0.6, 0.5, 0.4])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build().eval()
    images, _ = cifar10("train20k", normalisation)
    test, answers = cifar10("test5k", normalisation)
    data = gc.Data(calibration=calibration_batches(images, args.images, 64, args.seed))
    print(json.dumps({"float": accuracy(model, test, answers), "processor": instruction_set()}), flush=True)
    wanted = outputs(model, test)
    target = TARGETS[args.target]()
    steps = {"W8A8 everywhere": gc.Quantize(gc.W8A8)}
    for amount in args.amounts:
        steps[f"{amount:g}"] = gc.Quantize(to=gc.Latency(amount, target=target), options=(None, gc.W8A8))
    for name, step in steps.items():
        start = time.perf_counter()
        result = gc.compress(model, step, data, seed=args.seed)
        record = result.report.steps[0]
        row: dict[str, object] = {"latency": name, "seconds": round(time.perf_counter() - start)}
        row["kl"] = round(divergence(outputs(result.model, test), wanted), 6)
        row["accuracy"] = accuracy(result.model, test, answers)
        row["in_floating_point"] = sum(layer.action == "skipped" for layer in record.layers)
        row |= {key: round(value, 2) for key, value in record.numbers.items() if key.startswith("latency")}
        print(json.dumps(row | {"notes": record.notes[:1]}), flush=True)


if __name__ == "__main__":
    main()
