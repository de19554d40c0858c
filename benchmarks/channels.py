"""Channels cut without training on `woodfisher_resnet20`, beside Torch-Pruning in the same run.

Both cut to the same MACs with the same criterion, both with batch-norm statistics measured again on the same training
images: ours by the difference to the original, Torch-Pruning's by re-estimation.

    python -m benchmarks.channels [--criteria NAME,NAME] [--no-peer] [--calibration 1024] [--seed 0]

Only magnitude, taylor and hessian have a counterpart there; others want --no-peer.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks.datasets import batches, cifar10
from benchmarks.models import resnet20_projection
from gracile.graph import trace

CRITERIA: dict[str, Any] = {
    "magnitude": gc.Magnitude(power=2),
    "taylor": gc.Taylor(),
    "hessian": gc.Hessian(),
    "batch_norm_scale": gc.criteria.BatchNormScale(),
    "activation": gc.criteria.Activation(),
    "activation_l2": gc.criteria.Activation(power=2),
    "fpgm": gc.criteria.FPGM(),
    "gate_fisher": gc.criteria.GateFisher(),
    "random": gc.criteria.Random(),
}


def accuracy(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers in percent."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return 100 * right / sum(len(y) for _, y in data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--criteria", default="magnitude,taylor,hessian")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels = cifar10("train20k", "woodfisher")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.calibration]
    train = batches(images[chosen], labels[chosen], 128)
    test = batches(*cifar10("test5k", "woodfisher"), 250)
    data = gc.Data(calibration=train, train=train, loss=gc.losses.cross_entropy)
    model = resnet20_projection()
    dense = macs(model, test[0][0][:1])
    print(json.dumps({"model": "woodfisher_resnet20", "dense": accuracy(model, test), "macs": dense}))
    for ratio in (1.5, 2.0):
        for name in args.criteria.split(","):
            row = {"ratio": ratio, "criterion": name}
            for repair in (None, gc.solvers.LeastSquares()):
                start = time.perf_counter()
                budget = gc.MACs(1 / ratio)
                step = gc.Prune(to=budget, criterion=CRITERIA[name], pattern=gc.Channels(), repair=repair)
                result = gc.compress(model, step, data, seed=args.seed)
                seconds = time.perf_counter() - start
                kind = "gracile" if repair is None else "gracile_refit"
                row |= {kind: accuracy(result.model, test), f"{kind}_seconds": seconds}
                row["gracile_ratio"] = dense / macs(result.model, test[0][0][:1])
            if not args.no_peer:
                row |= torch_pruning(model, name, ratio, dense, train, test)
            print(json.dumps(row), flush=True)


def cut_by_torch_pruning(
    model: nn.Module, criterion: str, ratio: float, dense: int, train: list[tuple[Tensor, Tensor]]
) -> nn.Module:
    """Torch-Pruning's global pruning at the first of its steps that reaches the MACs."""
    import torch_pruning as tp

    net = copy.deepcopy(model)
    example = train[0][0][:1]
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
        "hessian": tp.importance.GroupHessianImportance(),
    }[criterion]
    head = next(m for m in net.modules() if isinstance(m, nn.Linear))
    steps = 50 if criterion == "hessian" else 200  # each step of that one differentiates every example again
    pruner = tp.pruner.BasePruner(
        net, example, importance, global_pruning=True, pruning_ratio=0.9, iterative_steps=steps, ignored_layers=[head]
    )
    for _ in range(steps):
        net.train()
        net.zero_grad()
        if criterion == "taylor":
            for x, y in train[:2]:
                nn.functional.cross_entropy(net(x), y).backward()
        elif criterion == "hessian":
            importance.zero_grad()
            losses = nn.functional.cross_entropy(net(train[0][0][:64]), train[0][1][:64], reduction="none")
            for loss in losses:
                net.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(net)
        net.eval()
        pruner.step()
        if macs(net, example) <= dense / ratio:
            break
    net.zero_grad()
    return net


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one example."""
    return trace(model, lambda net: net(example)).macs


def torch_pruning(
    model: nn.Module,
    criterion: str,
    ratio: float,
    dense: int,
    train: list[tuple[Tensor, Tensor]],
    test: list[tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Accuracy of Torch-Pruning's cut, as it is and with batch-norm statistics measured again."""
    net = cut_by_torch_pruning(model, criterion, ratio, dense, train)
    reached = dense / macs(net, train[0][0][:1])
    raw = accuracy(net, test)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        for x, _ in train:
            net(x)
    return {"torch_pruning_raw": raw, "torch_pruning": accuracy(net, test), "torch_pruning_ratio": reached}


if __name__ == "__main__":
    main()
