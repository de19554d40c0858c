"""Convolutional nets in few bits without training: rounding to nearest against the solvers, no labels.

    python -m benchmarks.rounding resnet20_akamaster [--schemes W4A8 W4A4] [--solvers nearest GPTQ] [--images 1024]
    python -m benchmarks.rounding resnet32_akamaster --schemes --mixed 0.15 0.12 --solvers GPTQ

Calibration on augmented images of train20k; test5k only judges. The first and the last layer are W8A8 in all schemes;
--mixed chooses W8A8, W4A8 or W2A8 for every layer within that share of the float model's bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import gracile as gc
from benchmarks.datasets import calibration_batches, cifar10
from benchmarks.models import accuracy
from benchmarks.structured import MODELS
from gracile.evaluate.size import state_bytes

SOLVERS: dict[str, dict[str, Any]] = {
    "nearest, min-max": {"ranges": gc.ranges.MinMax(), "correct": False},
    "nearest": {},
    "GPTQ": {"solver": gc.solvers.GPTQ()},
    "GPTQ, symmetric target": {"solver": gc.solvers.GPTQ(asymmetry=0.0)},
    "GPTQ, asymmetric target": {"solver": gc.solvers.GPTQ(asymmetry=1.0)},
    "AdaRound": {"solver": gc.solvers.AdaRound()},
    "AdaRound from nearest": {"solver": gc.solvers.AdaRound(start=None)},
    "AdaRound, nothing dropped": {"solver": gc.solvers.AdaRound(drop=0.0)},
    "AdaRound, asymmetric target": {"solver": gc.solvers.AdaRound(start=gc.solvers.GPTQ(asymmetry=1.0))},
    "GPTQ, not polished": {"solver": gc.solvers.GPTQ(polish=0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--schemes", nargs="*", default=["W4A8", "W4A4"])
    parser.add_argument("--mixed", nargs="+", type=float, default=[])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build()
    images, _ = cifar10("train20k", normalisation)
    test, answers = cifar10("test5k", normalisation)
    data = gc.Data(calibration=calibration_batches(images, args.images, 128, args.seed))
    print(json.dumps({"model": args.model, "float": accuracy(model, test, answers)}), flush=True)
    formats: list[dict[str, Any]] = [{"scheme": getattr(gc.formats, scheme)} for scheme in args.schemes]
    formats += [{"to": gc.Bytes(share), "options": (gc.W8A8, gc.W4A8, gc.W2A8)} for share in args.mixed]
    for settings in formats:
        for name in args.solvers:
            start = time.perf_counter()
            step = gc.Quantize(**settings, **SOLVERS[name])
            result = gc.compress(model, step, data, seed=args.seed)
            row = {"step": step.title, "solver": name, "seconds": round(time.perf_counter() - start, 1)}
            row["accuracy"] = accuracy(result.model, test, answers)
            row["bytes"] = state_bytes(result.model) / state_bytes(model)
            print(json.dumps(row | {"numbers": result.report.steps[0].numbers}), flush=True)


if __name__ == "__main__":
    main()
