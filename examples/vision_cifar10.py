"""Vision: CIFAR-10 with the pretrained ResNet-20 of Yerlan Idelbayev's pytorch_resnet_cifar10.

Run: python examples/vision_cifar10.py [--data DIR]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import accuracy, arguments, batches, show
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc

IMAGES = "CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), images [n, 32, 32, 3] uint8 and labels [n]: "
NEEDS = {
    "cifar10/train20k.npz": IMAGES + "20,000 training images, 2,000 of each class",
    "cifar10/test5k.npz": IMAGES + "5,000 test images",
    "cifar10/resnet20_akamaster.safetensors": "the weights of resnet20 in "
    "https://github.com/akamaster/pytorch_resnet_cifar10, its state_dict without the prefix 'module.'",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, which has no weights: every second pixel, and zeros for new channels."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.stride = stride
        self.added = (width_out - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """Logits of the ten classes from normalised images [n, 3, 32, 32] (He et al. 2015, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Normalised images [n, 3, 32, 32] and labels [n]."""
    with np.load(path, allow_pickle=False) as file:
        pixels = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"]).long()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(), labels


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels, and every second one mirrored: what the network was trained on."""
    padded, n = F.pad(images, (4, 4, 4, 4)), len(images)
    top, left = torch.randint(0, 9, (2, n, 1), generator=generator)
    pixels, rows = torch.arange(32), torch.arange(n)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[rows, (top + pixels)[:, :, None], (left + pixels)[:, None, :]]
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, moved.flip(2), moved).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model = ResNet20()
    model.load_state_dict(load_file(options.data / "cifar10/resnet20_akamaster.safetensors"))
    model.eval()

    # The network has seen every training image and names them all: only images that are new to it can show what a
    # change costs. Half of the test images judge the candidates, and the other half is for the last line only.
    images, labels = read(options.data / "cifar10/test5k.npz")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    evaluation, test = (batches(images[part], labels[part], 32) for part in order.chunk(2))
    print(f"Held out: accuracy {accuracy(model, evaluation):.4f}")

    generator = torch.Generator().manual_seed(0)
    images, labels = read(options.data / "cifar10/train20k.npz")
    order = torch.randperm(len(labels), generator=generator)
    data = gc.Data(
        calibration=[images[part] for part in order[:512].split(32)],
        train=batches(crop_and_flip(images[order], generator), labels[order], 64),
        evaluation=evaluation,
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )
    goal = gc.Goal(target=gc.OnnxRuntime(), max_drop=0.03, objective="latency", epochs=1, minutes=3)
    run = options.runs / "vision_cifar10"
    result = gc.optimize(model, data, goal, run_dir=run / "optimize", on_progress=show)
    result.save(run / "slim")

    print(result.report)
    print(f"Report: {run / 'slim' / 'report.html'}")
    for name, net in (("original", model), ("compressed", result.model)):
        print(f"Other half of the test images, {name}: accuracy {accuracy(net, test):.4f}")


if __name__ == "__main__":
    main()
