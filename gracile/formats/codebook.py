"""Levels learned from the weights themselves: one-dimensional k-means for each tensor, weighted where wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats.base import Format
from gracile.formats.integer import check_weight
from gracile.formats.packing import pack_bits, packed_bytes, unpack_bits

#: Sweeps of Lloyd's algorithm at most; it ends where no weight changes its level.
SWEEPS = 100


@dataclass(frozen=True)
class Codebook(Format):
    """x ≈ levels[code], the 2^bits levels of least Σ h (x − level)² that k-means finds, one of them 0.

    Lloyd's algorithm, from levels as dense as the cube root of the weights' density (Panter and Dite 1951). Zero keeps
    a level, so that pruned weights stay zero. h is 1, or with a solver what an error in the weight's column counts.

    bits: 1 to 8. Tensors: "codes" uint8 [ceil(n · bits / 8)] (see `packing`), "levels" float32 [2^bits], ascending,
    "shape" int64. For storage: runtimes get the decoded weight. Sources: Deep Compression, Han et al. 2015
    (arXiv:1510.00149), which starts from equal steps and has no zero; h as in Choi et al. 2017
    (arXiv:1612.01543).
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ConfigError(f"Codebook(bits={self.bits!r}): bits is a whole number from 1 to 8.")

    def encode(self, weight: Tensor, levels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of a weight; NaN and infinities are refused (DataError).

        levels: [2^bits], ascending; None learns them.
        """
        check_weight(weight)
        values = weight.detach().float().flatten()
        if values.numel() == 0:
            raise ConfigError(f"A weight of shape {tuple(weight.shape)} holds nothing to encode.")
        levels = self.learn(values) if levels is None else levels.detach().to(values)
        if tuple(levels.shape) != (1 << self.bits,) or bool((levels[1:] < levels[:-1]).any()):
            raise ConfigError(f"Codebook.encode(levels=...): expected {1 << self.bits} numbers, ascending.")
        return {
            "codes": pack_bits(nearest_code(values, levels).to(torch.uint8), self.bits),
            "levels": levels.clone(),
            "shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32: levels[code]."""
        shape = tuple(tensors["shape"].tolist())
        codes = unpack_bits(tensors["codes"], self.bits, math.prod(shape))
        return tensors["levels"][codes.long()].reshape(shape)

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and levels."""
        return packed_bytes(math.prod(shape), self.bits) + 4 * (1 << self.bits)

    def learn(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """The levels, float32 [2^bits], ascending, of weights of any shape.

        importance: h, of the weight's shape or one that broadcasts to it, positive; None: 1. In float64, on weights
        divided by the largest, so that no square is out of range.
        """
        count, peak = 1 << self.bits, weight.abs().max().double()
        if peak == 0:
            return torch.zeros(count, device=weight.device)
        x, order = (weight.double() / peak).flatten().sort()
        h = torch.ones_like(x)
        if importance is not None:
            h = (importance.double() / importance.max()).expand(weight.shape).flatten()[order]
        # Many levels lie best at the cube root of h times the density, of which a gap of sorted weights is the inverse.
        gaps = x.diff().pow(2 / 3) * ((h[1:] + h[:-1]) / 2).pow(1 / 3)
        reached = torch.cat([x.new_zeros(1), gaps.cumsum(0)])
        wanted = (torch.arange(count, device=x.device) + 0.5) / count * reached[-1]
        levels, codes = _with_zero(x[torch.searchsorted(reached, wanted).clamp(max=len(x) - 1)]), torch.empty(0)
        for _ in range(SWEEPS):
            found = nearest_code(x, levels)
            if torch.equal(found, codes):
                break
            codes = found
            sums = torch.zeros_like(levels).index_add_(0, codes, h * x)
            members = torch.zeros_like(levels).index_add_(0, codes, h)
            levels = _with_zero(torch.where(members > 0, sums / members, levels))
        return (levels * peak).float()


def nearest_code(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, halfway to the lower one; of equal levels the first.

    In float64: half of the sum of two denormal levels is no float32, and rounded it sends weights to the farther one.
    """
    borders = (levels[1:].double() + levels[:-1].double()) / 2
    return torch.searchsorted(levels, levels[torch.bucketize(values.double().contiguous(), borders)])


def _with_zero(levels: Tensor) -> Tensor:
    """The levels with the one nearest to zero put there, ascending."""
    return levels.index_fill(0, levels.abs().argmin(), 0.0).sort().values
