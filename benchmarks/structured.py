"""Channels cut in one shot, no labels and no training, by OBS with least-squares refit; what each part of it adds.

    python -m benchmarks.structured woodfisher_resnet20 [--ablate] [--calibration 1024] [--seed 0]

Calibration images are of train20k; test5k only judges the result.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import gracile as gc
from benchmarks.datasets import cifar10
from benchmarks.models import accuracy, resnet20_akamaster, resnet20_projection, resnet32_akamaster
from gracile.graph import trace

MODELS = {
    "woodfisher_resnet20": (resnet20_projection, "woodfisher"),
    "resnet20_akamaster": (resnet20_akamaster, "akamaster"),
    "resnet32_akamaster": (resnet32_akamaster, "akamaster"),
}

#: Layers whose channels are the residual stream's.
STREAM = ("conv1", "layer?.0.conv2", "layer?.0.downsample*")


def variants(ablate: bool) -> dict[str, dict[str, object]]:
    """Settings of Prune by name: the whole method, and it without one part each."""
    whole = {
        "criterion": gc.criteria.OBS(),
        "allocation": gc.allocate.MeasuredLoss(examples=256),
        "repair": gc.solvers.LeastSquares(),
        "pattern": gc.Channels(),
    }
    if not ablate:
        return {"OBS": whole}
    return {
        "OBS": whole,
        "magnitude for OBS": whole | {"criterion": gc.Magnitude(power=2)},
        "no measured allocation": whole | {"allocation": gc.allocate.GlobalRank()},
        "uniform allocation": whole | {"allocation": gc.allocate.Uniform()},
        "no refit": whole | {"repair": None},
        "one round of tables": whole | {"allocation": gc.allocate.MeasuredLoss(examples=256, rounds=0)},
        "no swap search": whole | {"criterion": gc.criteria.OBS(swap_sweeps=0)},
        "inner channels only": whole | {"exclude": STREAM},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build, normalisation = MODELS[args.model]
    model = build()
    images, _ = cifar10("train20k", normalisation)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.calibration]
    data = gc.Data(calibration=list(images[chosen].split(128)))
    test, labels = cifar10("test5k", normalisation)
    dense = trace(model, lambda net: net(test[:1])).macs
    print(json.dumps({"model": args.model, "dense": accuracy(model, test, labels), "macs": dense}), flush=True)
    for ratio in args.ratios:
        for name, settings in variants(args.ablate).items():
            start = time.perf_counter()
            result = gc.compress(model, gc.Prune(to=gc.MACs(1 / ratio), **settings), data, seed=args.seed)
            seconds = time.perf_counter() - start
            macs = trace(result.model, lambda net: net(test[:1])).macs
            row = {"ratio": dense / macs, "variant": name, "accuracy": accuracy(result.model, test, labels)}
            row["notes"] = [note for note in result.report.steps[0].notes if "round" in note]
            cut = {r.name: f"{r.kept}/{r.of}" for r in result.report.steps[0].layers if r.action == "cut"}
            print(json.dumps(row | {"seconds": seconds, "kept": cut}), flush=True)


if __name__ == "__main__":
    main()
