"""Size, as three separate numbers: bytes of a file, bytes of a model's state, stored bits per weight; and counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gracile.errors import DataError


@dataclass(frozen=True)
class ParameterCount:
    """Weights a model computes with: packed ones count as what they decode to, shared ones once.

    total: how many. zeros: how many of them are exactly zero.
    """

    total: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is zero."""
        return self.zeros / self.total if self.total else 0.0


def file_bytes(path: str | Path) -> int:
    """Bytes on disk of a file, or of all files below a directory (an export with its weights beside it)."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    raise DataError(f"'{path}' is no file or directory, so it has no size.")


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers as the model stores them; shared tensors once."""
    return sum(t.numel() * t.element_size() for t in _distinct(model.state_dict(keep_vars=True).values()))


def bits_per_weight(model: nn.Module) -> float:
    """8 · state_bytes / number of weights: scales, zero points, masks and running statistics included."""
    total = count_parameters(model).total
    return 8 * state_bytes(model) / total if total else 0.0


def count_parameters(model: nn.Module) -> ParameterCount:
    """How many weights a model computes with, and how many are zero.

    A parameter counts as it is. A module of a compressed model that has a buffer instead of a `weight` parameter
    offers that weight decoded as its attribute `weight`; it is decoded one layer at a time.
    """
    total = zeros = 0
    for tensor in _weights(model):
        total += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return ParameterCount(total, zeros)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from _distinct(model.parameters())
    for module in model.modules():
        if "weight" in module._parameters or "weight" in module._buffers or module._modules:
            continue  # where it is a parameter or buffer, or made of those of submodules, it is counted as these are
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            yield weight.detach()


def _distinct(values: Iterable[object]) -> Iterator[Tensor]:
    """Each stored tensor once: two that see the same memory the same way are one."""
    seen: set[tuple[object, ...]] = set()
    for value in values:
        if not isinstance(value, Tensor):
            continue  # extra state of a module
        pointer = value.data_ptr() if value.device.type != "meta" and value.numel() else id(value)
        key = (value.device, pointer, value.dtype, tuple(value.shape), value.stride())
        if key not in seen:
            seen.add(key)
            yield value.detach()
