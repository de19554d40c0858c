"""What each format, range, criterion and allocation alone does to ResNet-20: accuracy, with no training or repair.

Run from the checkout: python -m benchmarks.parts formats|criteria   (a few minutes on two cores)
Model: resnet20_akamaster on CIFAR-10 test5k. Gradients: 512 images of train20k. No step of the library is involved, so
the numbers show the method and not a repair after it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.datasets import batches, cifar10
from benchmarks.models import accuracy, resnet20_akamaster
from gracile.allocate import GlobalRank, Uniform
from gracile.criteria import Criterion, Gradient, Hessian, Magnitude, Random, Taylor
from gracile.data import Data
from gracile.formats import FixedPoint, Format, Int, PerGroup, PerTensor, bits_per_weight
from gracile.layer_stats import LayerStats
from gracile.losses import cross_entropy
from gracile.patterns import NM, Unstructured
from gracile.ranges import MSE, MinMax, Percentile, Range
from gracile.stats.gradients import collect_gradients

EXAMPLES = 512

FORMATS: list[tuple[Format, Range | None]] = [
    (FixedPoint(256), None),
    (FixedPoint(64), None),
    (FixedPoint(16), None),
    (Int(8), MinMax()),
    (Int(6), MinMax()),
    *[(Int(b), r) for b in (4, 3) for r in (MinMax(), Percentile(99.0), MSE(), MSE(power=2.4))],
    (Int(4, symmetric=False), MinMax()),
    (Int(4, symmetric=False), MSE()),
    (Int(4, PerTensor()), MinMax()),
    (Int(4, PerTensor()), MSE()),
    (Int(4, PerGroup(16)), MinMax()),
    (Int(4, PerGroup(16)), MSE()),
]
CRITERIA: list[Criterion] = [Magnitude(), Gradient(), Taylor(), Hessian(), Hessian(hutchinson_probes=8), Random(0)]


def changed(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy in which every weight matrix but the first convolution's is replaced."""
    trial = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trial.named_parameters():
            if name in matrices(model):
                parameter.copy_(change(name, parameter))
    return trial


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight matrices, without the first convolution: its 27 columns no group divides."""
    return {n: p for n, p in model.named_parameters() if p.ndim > 1 and n != "conv1.weight"}


def formats(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    for fmt, ranges in FORMATS:

        def coded(name: str, weight: Tensor, fmt: Format = fmt, ranges: Range | None = ranges) -> Tensor:
            if isinstance(fmt, Int) and ranges is not None:
                return fmt.decode(fmt.encode(weight, ranges.weight(weight, fmt)))
            return fmt.decode(fmt.encode(weight))

        bits = bits_per_weight(fmt, matrices(model)["layer3.0.conv2.weight"].shape)
        print(f"{fmt} {ranges or ''}: {accuracy(changed(model, coded), images, labels):.2f} % at {bits:.2f} bits")


def criteria(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    train_images, train_labels = cifar10("train20k")
    data = Data(train=batches(train_images[:EXAMPLES], train_labels[:EXAMPLES], 128), loss=cross_entropy)
    for criterion in CRITERIA:
        stats = {name: LayerStats() for name in matrices(model)}
        if criterion.needs:
            probes = getattr(criterion, "hutchinson_probes", None) or 1
            generator = torch.Generator().manual_seed(0)
            stats = collect_gradients(
                model, list(stats), criterion.needs, data, examples=EXAMPLES, probes=probes, generator=generator
            )
        scores = {name: criterion(weight, stats[name]) for name, weight in matrices(model).items()}
        for sparsity in (0.5, 0.7):
            row = []
            for allocation in (Uniform(), GlobalRank()):
                removed = allocation(scores, sparsity)
                masks = {n: Unstructured().mask(s, removed[n] / s.numel()) for n, s in scores.items()}
                row.append(accuracy(changed(model, lambda name, w, masks=masks: w * masks[name]), images, labels))
            print(f"{criterion} {sparsity:.0%}: uniform {row[0]:.2f} %, global {row[1]:.2f} %")
        nm = {n: NM(2, 4).mask(s) for n, s in scores.items()}
        print(f"{criterion} 2:4: {accuracy(changed(model, lambda name, w, nm=nm: w * nm[name]), images, labels):.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("formats", "criteria"))
    parser.add_argument("--images", type=int, default=5000, help="of test5k, from the start")
    arguments = parser.parse_args()
    model = resnet20_akamaster()
    images, labels = (tensor[: arguments.images] for tensor in cifar10("test5k"))
    print(f"untouched: {accuracy(model, images, labels):.2f} %")
    (formats if arguments.part == "formats" else criteria)(model, images, labels)


if __name__ == "__main__":
    main()
