"""Channels cut in one shot, no labels and no training, by OBS with least-squares refit; what each part of it adds.

    python -m benchmarks.structured woodfisher_resnet20 [--variants all] [--tune 3] [--cuts 1] [--seed 0]

All images are of train20k; test5k only judges the result. The nets have memorised these images, so that what a cut does
to them says little: the batches that the allocation is judged by, the first of every eight, hold others, flipped and
shifted. --low-rank: the part of the way to the budget, by ratio, that is left to Factorize after the cut. --tune:
epochs of distillation from the original on augmented train20k after the cut, labels unused; with --cuts above 1 the cut
is made in so many parts between the first half of these epochs. Hints need the width of the stream: --no-hints where a
variant cuts it; --soft-labels adds the divergence of the outputs to them.
"""

from __future__ import annotations

import argparse
import json
import time
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks.channels import cut_by_torch_pruning, macs
from benchmarks.datasets import augment, augmented_loader, batches, cifar10
from benchmarks.models import accuracy, resnet20_akamaster, resnet20_projection, resnet32_akamaster
from benchmarks.separable import separable
from gracile.steps import AdamW

MODELS = {
    "woodfisher_resnet20": (resnet20_projection, "woodfisher"),
    "resnet20_akamaster": (resnet20_akamaster, "akamaster"),
    "resnet32_akamaster": (resnet32_akamaster, "akamaster"),
    "separable": (separable, "akamaster"),  # trained by benchmarks.separable
}

#: Images in a batch to fit on, and in one that the allocation is judged by.
BATCH, JUDGED = 147, 512

#: Layers whose channels are the residual stream's.
STREAM = ("conv1", "layer?.0.conv2", "layer?.0.downsample*")

#: Torch-Pruning's group magnitude with global ranking, then the same epochs of the same distillation.
PEER = "Torch-Pruning"


def variants(rounds: int, model: nn.Module) -> dict[str, dict[str, object]]:
    """Settings of Prune by name: the whole method, it without one part each, and the usual way."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    stream = tuple(pattern for pattern in STREAM if any(fnmatch(name, pattern) for name in layers))
    whole = {
        "criterion": gc.criteria.OBS(),
        "allocation": gc.allocate.MeasuredLoss(examples=JUDGED, rounds=rounds),
        "repair": gc.solvers.LeastSquares(),
        "pattern": gc.Channels(),
    }
    return {
        "OBS": whole,
        "magnitude for OBS": whole | {"criterion": gc.Magnitude(power=2)},
        "no measured allocation": whole | {"allocation": gc.allocate.GlobalRank()},
        "uniform allocation": whole | {"allocation": gc.allocate.Uniform()},
        "no refit": whole | {"repair": None},
        "one start, no rounds": whole | {"allocation": gc.allocate.MeasuredLoss(examples=JUDGED, rounds=0)},
        "no swap search": whole | {"criterion": gc.criteria.OBS(swap_sweeps=0)},
        "inner channels only": whole | {"exclude": stream},
        "uniform magnitude": {"pattern": gc.Channels(), "allocation": gc.allocate.Uniform()},
        "uniform magnitude, inner": {
            "pattern": gc.Channels(),
            "allocation": gc.allocate.Uniform(),
            "exclude": stream,
        },
    }


def calibration(images: Tensor, count: int, seed: int) -> list[Tensor]:
    """Batches to fit on, and as the first of every eight one that judges."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    fitted = images[order[:count]].split(BATCH)
    batches = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(0, len(fitted), 7):
            start = count + i // 7 * JUDGED
            batches += [augment(images[order[start : start + JUDGED]]), *fitted[i : i + 7]]
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=["OBS"], help="names, or: all; Torch-Pruning needs --tune")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--calibration", type=int, default=2058)
    parser.add_argument("--low-rank", type=float, default=0.0)
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--no-hints", dest="hints", action="store_false", help="soft labels in their place")
    parser.add_argument("--soft-labels", action="store_true", help="beside the hints, at temperature 1")
    parser.add_argument("--images", choices=("train20k", "train50k"), default="train20k", help="to train on")
    parser.add_argument("--mixup", type=float, default=0.5)
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="of the allocation, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if PEER in args.variants and not args.tune:
        parser.error(f"{PEER} without training is in benchmarks.channels")
    if args.soft_labels and not args.hints:
        parser.error("--no-hints trains by soft labels already")
    build, normalisation = MODELS[args.model]
    model = build()
    images, labels = cifar10("train20k", normalisation)
    training = cifar10(args.images, normalisation)
    data = gc.Data(calibration=calibration(images, args.calibration, args.seed), train=augmented_loader(*training))
    test, answers = cifar10("test5k", normalisation)
    dense = macs(model, test[:1])
    print(json.dumps({"model": args.model, "dense": accuracy(model, test, answers), "macs": dense}), flush=True)
    for ratio in args.ratios:
        for name in [*variants(args.rounds, model), PEER]:
            if name not in args.variants and ("all" not in args.variants or name == PEER):
                continue
            start = time.perf_counter()
            if name == PEER:
                labelled = batches(images[: args.calibration], labels[: args.calibration], 128)
                student = cut_by_torch_pruning(model, "magnitude", ratio, dense, labelled)
                step = distillation(args)
            else:
                student, step = model, method(variants(args.rounds, model)[name], ratio, args)
            result = gc.compress(student, step, data, teacher=model, seed=args.seed)
            seconds = time.perf_counter() - start
            left = macs(result.model, test[:1])
            row = {"ratio": dense / left, "variant": name, "accuracy": accuracy(result.model, test, answers)}
            row["notes"] = [note for note in result.report.steps[0].notes if "round" in note]
            cut = {r.name: f"{r.kept}/{r.of}" for r in result.report.steps[0].layers if r.action == "cut"}
            each = [round(step.seconds) for step in result.report.steps]
            print(json.dumps(row | {"tuned": args.tune, "seconds": seconds, "each": each, "kept": cut}), flush=True)


def method(settings: dict[str, object], ratio: float, args: argparse.Namespace) -> gc.Step:
    """The cut with these settings, and what the arguments add to it."""
    step: gc.Step = gc.Prune(to=gc.MACs(1 / ratio), **settings)
    if args.low_rank:
        thin = gc.Factorize(to=gc.MACs(1 / ratio, way=args.low_rank), repair=gc.solvers.LeastSquares())
        cut = gc.MACs(1 / ratio, way=1 - args.low_rank) if args.low_rank < 1 else None
        step = gc.Recipe(gc.Prune(to=cut, **settings), thin) if cut is not None else thin
    if not args.tune:
        return step
    distil = distillation(args)
    return gc.Recipe(step, distil) if args.cuts == 1 else gc.Gradual(step, distil, rounds=args.cuts)


def distillation(args: argparse.Namespace) -> gc.Distill:
    """From the original: its states behind every block, its logits, or both."""
    losses: tuple[object, ...] = (gc.losses.Hint(),) if args.hints else (gc.SoftLabels(temperature=3.0),)
    if args.soft_labels:
        losses += (gc.SoftLabels(temperature=1.0),)
    return gc.Distill(
        losses=losses,
        epochs=args.tune,
        mixup=args.mixup,
        optimizer=AdamW(args.learning_rate, weight_decay=0.0),
        mixed_precision=True,
    )


if __name__ == "__main__":
    main()
