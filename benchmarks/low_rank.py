"""Layers of low rank without labels or training, beside the plain SVD of the weights at the same ranks.

    python -m benchmarks.low_rank resnet20 [--to 0.67 0.5] [--calibration 2058] [--powers 0.5] [--seed 0]
    python -m benchmarks.low_rank minilm [--to 0.67 0.5] [--calibration 500]

`resnet20` is woodfisher_resnet20, its calibration that of `benchmarks.structured`: accuracy on test5k. `minilm` has
that of `benchmarks.structured_sentences`: Spearman on the STS-B test pairs, mean cosine loss on 400 sentences held out.
"whitened" takes the ranks of the row before it too, each weight decomposed in the metric of the inputs of the original:
neither fitted to the original's outputs behind other factorized layers, nor corrected.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks import sentences
from benchmarks.datasets import cifar10
from benchmarks.models import accuracy, resnet20_projection
from benchmarks.structured import calibration
from benchmarks.structured_sentences import by_length, cosine_loss, macs, spearman, training_sentences
from gracile.graph import trace
from gracile.solvers.low_rank import symmetric
from gracile.stats.collect import collect_activations
from gracile.surgery import Swap, apply

Judge = Callable[[nn.Module], dict[str, float]]


def resnet20(count: int, seed: int) -> tuple[nn.Module, gc.Data, Judge]:
    """Model, calibration data, and what is measured of a model."""
    model = resnet20_projection()
    images, _ = cifar10("train20k", "woodfisher")
    test, answers = cifar10("test5k", "woodfisher")

    def judge(net: nn.Module) -> dict[str, float]:
        return {"macs": trace(net, lambda m: m(test[:1])).macs, "accuracy": accuracy(net, test, answers)}

    return model, gc.Data(calibration=calibration(images, count, seed)), judge


def minilm(count: int, seed: int) -> tuple[nn.Module, gc.Data, Judge]:
    """Model, calibration data, and what is measured of a model."""
    model = sentences.minilm()
    texts = training_sentences(seed)
    held_out = by_length(texts[-400:], 64, seed)

    def judge(net: nn.Module) -> dict[str, float]:
        return {"macs": macs(net), "spearman": spearman(net), "cosine_loss": cosine_loss(net, model, held_out)}

    return model, gc.Data(calibration=by_length(texts[:count], 32, seed)), judge


def decomposed(model: nn.Module, swaps: list[Swap], data: gc.Data, whitened: bool) -> nn.Module:
    """The model with layers of the same ranks, from the SVD of each weight alone or in the metric of its inputs."""
    net: Any = copy.deepcopy(model)
    stats = collect_activations(model, [s.name for s in swaps], {"gram", "input_mean"}, data) if whitened else {}
    for swap in swaps:
        layer: Any = net.get_submodule(swap.name)
        matrix, rank, side = layer.weight.detach().flatten(1).double(), swap.config["rank"], swap.config.get("split")
        gram, mean = torch.eye(matrix.shape[1], dtype=torch.float64), torch.zeros(matrix.shape[1], dtype=torch.float64)
        if whitened:
            found = stats[swap.name]
            gram, mean = _double(found.gram)[0] / 2, _double(found.input_mean)
        moments = symmetric(matrix, gram, mean)
        if side is None:
            factors = gc.solvers.LowRank(damping=1e-6)(matrix, moments, False).factors(rank)
        else:
            solver = gc.solvers.SpatialLowRank(damping=1e-6, sweeps=0)
            factors = solver(matrix, moments, False, layer.kernel_size, side == "horizontal").factors(rank)
        apply(net, [swap])
        net.get_submodule(swap.name).set_factors(factors.first, factors.second)
    return net  # type: ignore[no-any-return]


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("resnet20", "minilm"))
    parser.add_argument("--to", type=float, nargs="+", default=[0.67, 0.5], help="shares of the multiply-accumulates")
    parser.add_argument("--calibration", type=int, default=None, help="images or sentences. [default: 2058 or 500]")
    parser.add_argument("--examples", type=int, default=None, help="behind one loss. [default: 512 or 128]")
    parser.add_argument("--powers", type=float, nargs="+", default=[gc.Factorize(0.5).power])
    parser.add_argument("--no-sides", action="store_true", help="convolutions are not split along their kernels' sides")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images = args.model == "resnet20"
    model, data, judge = (resnet20 if images else minilm)(args.calibration or (2058 if images else 500), args.seed)
    print(json.dumps({"model": args.model, **judge(model)}), flush=True)
    for share in args.to:
        for power in args.powers:
            start = time.perf_counter()
            spatial = None if args.no_sides else gc.solvers.SpatialLowRank()
            examples = args.examples or (512 if images else 128)
            step = gc.Factorize(to=gc.MACs(share), power=power, examples=examples, spatial=spatial)
            result = gc.compress(model, step, data, seed=args.seed)
            seconds = time.perf_counter() - start
            rows = [row for row in result.report.steps[0].layers if row.action == "factorized"]
            ranks = {row.name: f"{row.kept}/{row.of}" for row in rows}
            row = {"to": share, "power": power, "variant": "Factorize", **judge(result.model), "seconds": seconds}
            print(json.dumps(row | {"ranks": ranks, "notes": result.report.steps[0].notes}), flush=True)
            swaps = [edit for edit in result.edits if isinstance(edit, Swap)]
            for variant, whitened in (("whitened", True), ("plain SVD", False)):
                net = decomposed(model, swaps, data, whitened)
                print(json.dumps({"to": share, "power": power, "variant": variant, **judge(net)}), flush=True)


if __name__ == "__main__":
    main()
