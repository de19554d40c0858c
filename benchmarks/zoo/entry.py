"""What the zoo is made of: a model that is built tiny, with random weights, and a batch that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any


class CannotBuild(Exception):
    """Raised where a library has no tiny CPU model of that name; the message says why. Such a model is not counted."""


@dataclass(frozen=True)
class Entry:
    """One model. build: gives it in eval mode, with a batch as `gracile.Data` takes it."""

    collection: str
    name: str
    build: Callable[[], tuple[nn.Module, Batch]]


def randomise(model: nn.Module) -> None:
    """Random biases, norms and statistics instead of the zeros and ones of a fresh model, so that errors show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.ndim > 1 or not tensor.numel():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.add_(0.1 * noise.abs())
            elif name.endswith("running_mean") or isinstance(tensor, nn.Parameter):
                tensor.add_(0.1 * noise)


def image(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    """A seeded batch of images."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))
