"""What a number format is: a frozen dataclass that encodes a weight into storable tensors and decodes it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gracile.errors import ConfigError


@dataclass(frozen=True)
class Granularity:
    """How many weights share one scale."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor; `scale` has shape []."""


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of `axis`; `scale` has shape [size of that axis]."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `size` consecutive weights of a row; `scale` has shape [rows, ceil(columns / size)].

    The tensor is seen as [rows, columns]: a row is an index of axis 0; the columns are all other axes flattened. Where
    size does not divide them, the last group of each row is shorter.
    """

    size: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"PerGroup(size={self.size!r}): a whole number of at least 1.")


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for all values along the last axis, found when the model runs; of inputs, and of no weight."""


class Format(ABC):
    """A way to write numbers. Members are frozen dataclasses; all of these are pure functions of their fields.

    encode(weight) -> tensors: named tensors that hold the weight, packed; always with "shape" (int64, the weight's).
    decode(tensors) -> weight: float32, of the encoded shape.
    size_bytes(shape) -> bytes those tensors take, without "shape".
    bits: of one code. step: between the values of neighbouring codes, in scales; None where that differs.
    """

    bits: int
    step: ClassVar[int | None] = None

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def decode(self, tensors: dict[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int: ...


def format_to_config(fmt: Any) -> dict[str, Any]:
    """A format or granularity as plain data: its class name under "type", and its fields."""
    fields = {k: format_to_config(v) if isinstance(v, (Format, Granularity)) else v for k, v in vars(fmt).items()}
    return {"type": type(fmt).__name__, **fields}
