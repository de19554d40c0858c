"""Four bits of floating point whose scales have few bits themselves."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gracile.formats import NVFP4
from gracile.formats.micro_float import SMALLEST_E4M3, of_e4m3, powers_of_two
from gracile.steps.quantization.grids.levels import LevelGrid


class MXFP4Grid(LevelGrid):
    """2^e · level for 32 columns of a row."""

    SHARES: ClassVar[tuple[float, ...]] = (2.0, 1.0, 0.5, 0.25)

    def stored(self, scale: Tensor) -> Tensor:
        """Powers of two from 2^-127 to 2^127."""
        part, power = torch.frexp(scale)  # scale = part · 2^power, part in [0.5, 1): the middle of two powers is 0.75
        power = (power - (part <= 0.75).to(power.dtype)).clamp(-127, 127)
        return torch.ldexp(torch.ones_like(scale), power)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        _, power = torch.frexp(scale)
        tensors: dict[str, Tensor] = self.fmt.encode(weight, (power + 126).to(torch.uint8))
        return tensors

    def stored_scale(self, encoded: dict[str, Tensor]) -> Tensor:
        return powers_of_two(encoded["exponent"])


class NVFP4Grid(LevelGrid):
    """t · s · level for 16 columns of a row, s a number of e4m3; t of the tensor, as rounding to nearest has it."""

    def __init__(self, fmt: NVFP4, tensor_scale: Tensor) -> None:
        super().__init__(fmt)
        self.tensor_scale = tensor_scale.detach().cpu()

    def stored(self, scale: Tensor) -> Tensor:
        """The tensor's scale times a positive number of e4m3."""
        return of_e4m3(self._codes(scale), self.tensor_scale.to(scale.device)).to(scale)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self.fmt.encode(weight, self._codes(scale), self.tensor_scale)
        return tensors

    def stored_scale(self, encoded: dict[str, Tensor]) -> Tensor:
        return of_e4m3(encoded["scale_codes"], encoded["tensor_scale"])

    def _codes(self, scale: Tensor) -> Tensor:
        largest = torch.finfo(torch.float8_e4m3fn).max
        share = (scale / self.tensor_scale.to(scale)).clamp(SMALLEST_E4M3, largest)
        return share.to(torch.float8_e4m3fn).view(torch.uint8)
