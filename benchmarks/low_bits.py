"""Quantization-aware distillation: a ResNet-20 with few bits in weights and inputs, trained on its learned grids.

    python -m benchmarks.low_bits [--schemes W4A4 W3A3 W2A2] [--epochs 20] [--no-hints] [--solver GPTQ] [--seed 0]
    python -m benchmarks.low_bits --epochs 0 --solver GPTQ --mid-rise

From `apot_res20_32bit` (92.96 % on test5k). Training on augmented images of train20k, by soft labels of the float model
and, unless --no-hints, its blocks' states; part of these choose the epoch, and test5k only judges. First and last layer
have 8 bits, and with --projections the shortcuts' convolutions too (0.9 % of the weights), through which all of a
stream has to pass.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import gracile as gc
from benchmarks.datasets import augmented_loader, calibration_batches, cifar10
from benchmarks.models import accuracy, resnet20_projection
from gracile.evaluate.size import state_bytes
from gracile.steps import AdamW

#: The convolutions of shortcuts: what they give is all that a stream holds at its beginning.
PROJECTIONS = ("*downsample*",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W3A3", "W2A2"])
    parser.add_argument("--epochs", type=int, default=20, help="0: no training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--mixup", type=float, default=0.5)
    parser.add_argument("--hints", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--projections", action="store_true", help="of shortcuts, in 8 bits")
    parser.add_argument("--mid-rise", action="store_true", help="weights on grids that zero lies in the middle of")
    parser.add_argument("--solver", choices=("nearest", "GPTQ"), default="nearest")
    parser.add_argument("--images", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--batch", type=int, default=128, help="images in one step of the training")
    parser.add_argument("--train", type=int, default=20_000, help="images to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = resnet20_projection("apot_res20_32bit")
    images, labels = cifar10("train20k", "apot")
    test, answers = cifar10("test5k", "apot")
    calibration = calibration_batches(images, args.images, 128, args.seed)
    loader = augmented_loader(images[: args.train], labels[: args.train], args.batch)
    data = gc.Data(calibration=calibration, train=loader)
    print(json.dumps({"float": accuracy(model, test, answers), "settings": vars(args)}), flush=True)
    solver = gc.solvers.GPTQ() if args.solver == "GPTQ" else None
    for name in args.schemes:
        scheme = getattr(gc.formats, name)
        if args.mid_rise:
            scheme = replace(scheme, weight=gc.formats.MidRise(scheme.weight.bits))
        quantize: gc.Step = gc.Quantize(scheme, solver=solver)
        if args.projections:
            quantize = gc.Recipe(replace(quantize, exclude=PROJECTIONS), gc.Quantize(gc.W8A8))
        step: gc.Step = quantize if args.epochs == 0 else gc.Recipe(quantize, distillation(args))
        start = time.perf_counter()
        result = gc.compress(model, step, data, seed=args.seed)
        seconds = time.perf_counter() - start
        row = {"scheme": name, "accuracy": accuracy(result.model, test, answers), "seconds": round(seconds)}
        row["bytes"] = state_bytes(result.model) / state_bytes(model)
        print(json.dumps(row | {"numbers": result.report.steps[-1].numbers}), flush=True)


def distillation(args: argparse.Namespace) -> gc.Distill:
    """By soft labels and, unless the user wants none, hints."""
    return gc.Distill(
        losses=(gc.SoftLabels(temperature=args.temperature), *([gc.losses.Hint()] if args.hints else [])),
        epochs=args.epochs,
        mixup=args.mixup,
        optimizer=AdamW(args.learning_rate, weight_decay=0.0),
        mixed_precision=True,
    )


if __name__ == "__main__":
    main()
