"""Residual blocks of a CIFAR ResNet removed without labels or training, one more in each row.

    python -m benchmarks.depth [--model resnet32_akamaster] [--blocks 3] [--calibration 1024] [--seed 0]

Calibration images are of train20k; test5k only judges the result.
"""

from __future__ import annotations

import argparse
import json

import torch

import gracile as gc
from benchmarks.datasets import cifar10
from benchmarks.models import accuracy
from benchmarks.structured import MODELS
from gracile.graph import find_blocks, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet32_akamaster")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build()
    images, _ = cifar10("train20k", normalisation)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.calibration]
    data = gc.Data(calibration=list(images[chosen].split(128)))
    test, labels = cifar10("test5k", normalisation)
    blocks = len(find_blocks(model, lambda net: net(test[:1])))
    dense = trace(model, lambda net: net(test[:1])).macs
    print(json.dumps({"model": args.model, "dense": accuracy(model, test, labels), "blocks": blocks}), flush=True)
    for count in range(1, args.blocks + 1):
        row: dict[str, object] = {"removed": count}
        for name, repair in (("accuracy", None), ("accuracy_refit", gc.solvers.LeastSquares())):
            step = gc.Prune(count / blocks, pattern=gc.Layers(), repair=repair)
            result = gc.compress(model, step, data, seed=args.seed)
            row[name] = accuracy(result.model, test, labels)
        row["ratio"] = dense / trace(result.model, lambda net: net(test[:1])).macs
        row["names"] = [r.name for r in result.report.steps[0].layers if r.action == "removed"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
