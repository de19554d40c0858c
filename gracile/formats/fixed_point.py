"""Fixed point: the textbook quantization Q(x) = round(x · factor) / factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError, DataError
from gracile.formats.base import Format


@dataclass(frozen=True)
class FixedPoint(Format):
    """Q(x) = round(x · factor) / factor in float32, rounding half to even.

    factor: a positive number; a power of two (256 = 8 fractional bits) divides without a rounding error.

    Tensors: "codes" = round(x · factor) in the smallest of int8, int16 and int32 that holds them all, in the weight's
    shape, and "shape". Which integer that is only the weight can tell; `size_bytes` and `bits` assume int16, which at
    factor 256 holds |x| < 128.
    """

    factor: float = 256
    bits = 16

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
            raise ConfigError(f"FixedPoint(factor={self.factor!r}): expected a number.")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(f"FixedPoint(factor={self.factor!r}): factor must be positive and finite.")

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes of a weight; NaN and infinities raise DataError, codes beyond int32 ConfigError."""
        codes = torch.round(weight.detach().float() * self.factor)
        if not bool(torch.isfinite(weight.detach()).all()):
            raise DataError(f"A weight of shape {tuple(weight.shape)} has values that are NaN or infinite.")
        low, high = (codes.min().item(), codes.max().item()) if codes.numel() else (0.0, 0.0)
        for dtype in (torch.int8, torch.int16, torch.int32):
            limits = torch.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                shape = torch.tensor(weight.shape, dtype=torch.int64)
                return {"codes": codes.to(dtype), "shape": shape}
        raise ConfigError(
            f"FixedPoint(factor={self.factor}): weights up to {weight.abs().max().item():.3g} overflow 32 bits.\n"
            f"  Use a smaller factor, or Int(bits=8)."
        )

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """codes / factor, float32."""
        return tensors["codes"].float() / self.factor

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of the codes, taken to be int16."""
        return 2 * math.prod(shape)
