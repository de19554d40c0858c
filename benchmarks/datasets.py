"""CIFAR-10 as arrays and as the normalised tensors that a checkpoint expects."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.models import NORMALISATION, SHARED

SPLITS = {"train": "train20k", "train20k": "train20k", "test": "test5k", "test5k": "test5k"}


def cifar10_arrays(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, 32, 32, 3] uint8 and labels [n] of 'train20k' or 'test5k'."""
    with np.load(SHARED / "cifar10" / f"{SPLITS[split]}.npz") as archive:
        images, labels = (archive[name] for name in archive.files[:2])
    if images.ndim != 4:
        images, labels = labels, images
    return images, labels.astype(np.int64)


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


def augmented_loader(images: Tensor, labels: Tensor, size: int = 128) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches."""
    return DataLoader(Augmented(images, labels), batch_size=size, shuffle=True, collate_fn=_whole)


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
