"""CIFAR-10 as arrays and as the normalised tensors that a checkpoint expects."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
