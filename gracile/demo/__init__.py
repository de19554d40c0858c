"""The demo's model and data, both in the package: a small residual network that reads handwritten digits.

Named on the command line as `gracile.demo:load_model` and `gracile.demo:load_data`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.data import Data

#: How the 1,797 digits are divided: the order is shuffled, and stratified by class.
TRAIN, EVALUATION = 1097, 700


class DigitsNet(nn.Module):
    """Logits of the ten digits: four residual blocks over 16 × 16 pixels, 32 channels and then 64.

    images: [n, 1, 16, 16] float32 in [0, 1] -> [n, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Block(32, 32), Block(32, 64, stride=2), Block(64, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))), a batch norm after each; a 1 × 1 convolution where x changes shape."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


def load_model() -> DigitsNet:
    """The trained network, in eval mode. `benchmarks/train_demo_model.py` made its weights."""
    from safetensors.torch import load_file

    model = DigitsNet()
    model.load_state_dict(load_file(asset("digits_cnn.safetensors")))
    return model.eval()


def load_data(batch_size: int = 32) -> Data:
    """The digits as batches (images [b, 1, 16, 16], labels [b]): 1,097 to train on, 700 others to judge on.

    The calibration batches are the first 256 training images, without labels. The batches are the same at every call.
    """
    from gracile.losses import cross_entropy
    from gracile.metrics import accuracy

    train, evaluation = load_split("train"), load_split("evaluation")
    return Data(
        calibration=[images for images, _ in batches(train[0][:256], train[1][:256], batch_size)],
        train=batches(*train, batch_size),
        evaluation=batches(*evaluation, batch_size),
        metric=accuracy,
        loss=cross_entropy,
    )


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 16, 16] float32 in [0, 1], the 8 × 8 originals at twice the size, and labels [n] int64."""
    with np.load(asset("digits.npz"), allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"])
    pixels = images.unsqueeze(1).float() / 16
    return F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False), labels.long()


def batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive batches of `size` examples; the last may be smaller."""
    return list(zip(images.split(size), labels.split(size)))


def asset(name: str) -> Path:
    """Path of a file that the demo ships."""
    return Path(str(resources.files("gracile.demo") / "assets" / name))
