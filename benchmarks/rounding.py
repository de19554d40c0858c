"""Convolutional nets in few bits without training: rounding to nearest against the solvers, no labels.

    python -m benchmarks.rounding resnet20_akamaster [--schemes W4A8 W4A4] [--solvers nearest gptq] [--images 1024]

Calibration on images of train20k; test5k only judges. The first and the last layer are W8A8 in all of them.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import gracile as gc
from benchmarks.datasets import augment, cifar10
from benchmarks.models import accuracy
from benchmarks.structured import MODELS

SOLVERS = {
    "nearest, min-max": {"ranges": gc.ranges.MinMax(), "correct": False},
    "nearest": {},
    "GPTQ": {"solver": gc.solvers.GPTQ()},
    "GPTQ, symmetric target": {"solver": gc.solvers.GPTQ(asymmetry=0.0)},
    "GPTQ, asymmetric target": {"solver": gc.solvers.GPTQ(asymmetry=1.0)},
    "GPTQ, not polished": {"solver": gc.solvers.GPTQ(polish=0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=["W4A8", "W4A4"])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build()
    images, _ = cifar10("train20k", normalisation)
    test, answers = cifar10("test5k", normalisation)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        data = gc.Data(calibration=[augment(batch) for batch in images[order].split(128)])
    print(json.dumps({"model": args.model, "float": accuracy(model, test, answers)}), flush=True)
    for scheme in args.schemes:
        for name in args.solvers:
            start = time.perf_counter()
            result = gc.compress(model, gc.Quantize(getattr(gc.formats, scheme), **SOLVERS[name]), data, seed=args.seed)
            row = {"scheme": scheme, "solver": name, "accuracy": accuracy(result.model, test, answers)}
            row["seconds"] = time.perf_counter() - start
            row["numbers"] = result.report.steps[0].numbers
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
