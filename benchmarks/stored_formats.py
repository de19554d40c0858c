"""Formats that are for storage on a convolutional net: rounded to nearest, by a solver, and trained.

    python -m benchmarks.stored_formats [resnet20_akamaster] [--formats Codebook3 NVFP4] [--epochs 0] [--seed 0]

Weights of all layers, inputs float. Calibration on augmented images of train20k, training on them by soft labels of the
float model; test5k only judges. kl: of the float model's answers there to the rounded one's. bytes: of the state, as a
share of the float model's.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks.datasets import augmented_loader, calibration_batches, cifar10
from benchmarks.models import accuracy
from benchmarks.structured import MODELS
from gracile.evaluate.size import state_bytes
from gracile.stats.match import divergence

FORMATS: dict[str, gc.formats.Format] = {
    "FP8": gc.formats.FP8(),
    "NVFP4": gc.formats.NVFP4(),
    "MXFP4": gc.formats.MXFP4(),
    "NF4": gc.formats.NF4(),
    "Codebook4": gc.formats.Codebook(4),
    "Codebook3": gc.formats.Codebook(3),
    "Codebook2": gc.formats.Codebook(2),
    "Int4": gc.Int(4),
    "Int3": gc.Int(3),
    "FixedPoint16": gc.FixedPoint(16),
    "Ternary": gc.formats.Ternary(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="resnet20_akamaster")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--images", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--epochs", type=int, default=0, help="of training behind the solver")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build().eval()
    images, labels = cifar10("train20k", normalisation)
    test, answers = cifar10("test5k", normalisation)
    calibration = calibration_batches(images, args.images, 128, args.seed)
    data = gc.Data(calibration=calibration, train=augmented_loader(images, labels))
    print(json.dumps({"model": args.model, "float": accuracy(model, test, answers)}), flush=True)
    wanted = outputs(model, test)
    for name in args.formats:
        fmt = FORMATS[name]
        solved = gc.Quantize(fmt, solver=gc.solvers.GPTQ())
        steps: dict[str, gc.Step] = {"nearest": gc.Quantize(fmt), "GPTQ": solved}
        if args.epochs:
            steps["GPTQ and training"] = gc.Recipe(solved, distillation(args))
        for how, step in steps.items():
            start = time.perf_counter()
            result = gc.compress(model, step, data, seed=args.seed)
            row = {"format": name, "how": how, "seconds": round(time.perf_counter() - start, 1)}
            row["kl"] = round(divergence(outputs(result.model, test), wanted), 5)
            row["accuracy"] = accuracy(result.model, test, answers)
            row["bytes"] = round(state_bytes(result.model) / state_bytes(model), 4)
            print(json.dumps(row), flush=True)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [model(batch) for batch in images.split(500)]


def distillation(args: argparse.Namespace) -> gc.Distill:
    """By soft labels alone, half of the examples mixed."""
    return gc.Distill(
        losses=(gc.SoftLabels(temperature=1.0),),
        epochs=args.epochs,
        mixup=0.5,
        optimizer=gc.steps.AdamW(args.learning_rate, weight_decay=0.0),
        mixed_precision=True,
    )


if __name__ == "__main__":
    main()
