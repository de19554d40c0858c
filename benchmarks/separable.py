"""A small depthwise-separable net for CIFAR-10 (the layers of MobileNet), trained here once and kept in a file.

    python -m benchmarks.separable [--epochs 15] [--file runs/separable.safetensors]

Trained on train20k with flips and crops; test5k only judges it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.datasets import augmented_loader, cifar10
from benchmarks.models import accuracy

#: Channels and stride of each block of a depthwise and a pointwise convolution.
BLOCKS = ((64, 2), (128, 1), (128, 1), (256, 2), (256, 1), (512, 2))
FILE = Path("runs/separable.safetensors")


class Separable(nn.Sequential):
    """A convolution, then blocks of a depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""

    def __init__(self) -> None:
        width = 32
        layers: list[nn.Module] = [*_unit(3, width, 3, 1, 1)]
        for channels, stride in BLOCKS:
            layers += [*_unit(width, width, 3, stride, width), *_unit(width, channels, 1, 1, 1)]
            width = channels
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def separable(file: Path = FILE) -> Separable:
    """The trained net, in eval mode."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: train it first with python -m benchmarks.separable")
    model = Separable()
    model.load_state_dict(load_file(file))
    return model.eval()


def train(epochs: int, seed: int) -> Separable:
    """SGD with one cycle of the learning rate."""
    torch.manual_seed(seed)
    model = Separable().train().to(memory_format=torch.channels_last)  # depthwise layers train faster so
    loader = augmented_loader(*cifar10("train20k"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        start, losses = time.perf_counter(), list[Tensor]()
        for images, labels in loader:
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        seconds = time.perf_counter() - start
        print(json.dumps({"epoch": epoch, "loss": float(torch.stack(losses).mean()), "seconds": seconds}), flush=True)
    return model.eval().to(memory_format=torch.contiguous_format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.epochs, args.seed)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.file)
    print(json.dumps({"accuracy": accuracy(model, *cifar10("test5k"))}))


if __name__ == "__main__":
    main()
