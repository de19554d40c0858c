"""Formats whose codes name levels of a fixed table, times one scale per tensor, channel or group."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats.base import Format, Granularity, PerChannel, PerGroup
from gracile.formats.granularity import from_rows, scale_shape, to_rows
from gracile.formats.integer import SMALLEST_SCALE, check_weight
from gracile.formats.packing import pack_bits, packed_bytes, unpack_bits


class Levels(Format):
    """x ≈ scale · levels[code], the nearest level, halfway to the lower one.

    Tensors: "codes" uint8 [ceil(n · bits / 8)] (see `packing`), "scale" float32 (see `scale_shape`), "shape" int64
    [ndim]. These formats but for `MidRise` are for storage: runtimes get the decoded weight in floating point.
    """

    granularity: Granularity

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The levels in the order of their codes; of two that are equal the later is not used."""

    def scale_of(self, rows: Tensor) -> Tensor:
        """Scales [k] of weights [k, n] that share one each: the largest weight falls on the largest level."""
        largest = rows.abs().amax(1)
        scale = (largest / max(abs(level) for level in self.levels)).clamp(min=SMALLEST_SCALE)
        return torch.where(largest > 0, scale, torch.ones_like(scale))

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of "scale": [] per tensor, [size of axis] per channel, [rows, groups] per group."""
        return scale_shape(self.granularity, tuple(shape))

    def encode(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of a weight of any float dtype; NaN and infinities are refused (DataError).

        scale: shape `scale_shape(weight.shape)`; None: `scale_of` finds it.
        """
        check_weight(weight)
        shape = self.scale_shape(weight.shape)
        rows = to_rows(self.granularity, weight.detach().float())
        if scale is None:
            scale = self.scale_of(rows).reshape(shape)
        elif tuple(scale.shape) != shape or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ConfigError(
                f"{type(self).__name__}.encode(scale=...): expected positive numbers of shape {shape}, got "
                f"{tuple(scale.shape)}."
            )
        scale = scale.detach().to(weight.device, torch.float32)
        ascending, order = self._table(weight.device)
        places = torch.bucketize(rows / scale.reshape(-1, 1), (ascending[1:] + ascending[:-1]) / 2)
        codes = from_rows(self.granularity, order[places].to(torch.uint8), tuple(weight.shape))
        shape_tensor = torch.tensor(weight.shape, dtype=torch.int64)
        return {"codes": self._pack(codes), "scale": scale, "shape": shape_tensor}

    def nearest(self, x: Tensor) -> Tensor:
        """The level nearest to each value, halfway to the lower: what `encode` and `decode` make of it at scale 1."""
        ascending, _ = self._table(x.device)
        return ascending[torch.bucketize(x, (ascending[1:] + ascending[:-1]) / 2)]

    @property
    def reach(self) -> float:
        """How far the grid reaches in scales: beyond it weights count as clipped while they train."""
        return max(abs(level) for level in self.levels)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The levels in ascending order, each once, and their codes."""
        ascending, order = torch.tensor(self.levels, device=device).sort(stable=True)
        first = torch.cat([torch.ones_like(order[:1], dtype=torch.bool), ascending[1:] > ascending[:-1]])
        return ascending[first], order[first]

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32: scale · levels[code]."""
        shape = tuple(tensors["shape"].tolist())
        codes = self._unpack(tensors["codes"], math.prod(shape)).reshape(shape)
        table = torch.tensor(self.levels, device=codes.device)
        rows = table[to_rows(self.granularity, codes).long()] * tensors["scale"].reshape(-1, 1)
        return from_rows(self.granularity, rows, shape)

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and scales."""
        return packed_bytes(math.prod(shape), self.bits) + 4 * math.prod(self.scale_shape(shape))

    def _pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def _unpack(self, packed: Tensor, count: int) -> Tensor:
        return unpack_bits(packed, self.bits, count)


@dataclass(frozen=True)
class NF4(Levels):
    """Sixteen levels that hold equally many of normally distributed weights, 0 and ±1 among them.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), the table of its reference code.
    """

    granularity: Granularity = PerGroup(64)
    bits = 4

    @property
    def levels(self) -> tuple[float, ...]:
        # Quantiles of a normal distribution: eight steps above zero, seven below, the ends at 0.9677083.
        above, below = (torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
        levels = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0)])
        return tuple((levels / levels.max()).float().tolist())


@dataclass(frozen=True)
class FP4(Levels):
    """Floating point of four bits, a sign, two of exponent and one of mantissa: ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}.

    The code of −0 is not used. Source: E2M1 of the OCP Microscaling Formats specification 1.0, with a float32 scale.
    """

    granularity: Granularity = PerGroup(64)
    bits = 4

    @property
    def levels(self) -> tuple[float, ...]:
        positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        return (*positive, *(-level for level in positive))


@dataclass(frozen=True)
class PowersOfTwo(Levels):
    """scale · ±(p₁ + p₂), sums of two powers of two (or one) with as many levels as the bits allow: APoT.

    Besides the sign, 2 bits are {0, 1/4, 1/2, 1}; of 3, p₁ is of {0, 1/2, 1/4, 1/16} and p₂ of {0, 1/8}; of 4, p₁ is of
    {0, 1/2, 1/8, 1/32} and p₂ of {0, 1/4, 1/16, 1/64}. The largest sum is brought to 1.
    Source: Li et al. 2020 (arXiv:1909.13144), the sets of its reference code.

    bits: 3 to 5. The code of −0 is not used.
    """

    bits: int = 4
    granularity: Granularity = PerChannel(0)

    def __post_init__(self) -> None:
        if self.bits not in _SUMMANDS:
            raise ConfigError(f"PowersOfTwo(bits={self.bits!r}): bits is 3, 4 or 5.")

    @property
    def levels(self) -> tuple[float, ...]:
        first, second = _SUMMANDS[self.bits]
        sums = sorted(a + b for a in first for b in second)
        positive = tuple(level / sums[-1] for level in sums)
        return (*positive, *(-level for level in positive))


_SUMMANDS = {
    3: ((0.0, 1 / 4, 1 / 2, 1.0), (0.0,)),
    4: ((0.0, 1 / 2, 1 / 4, 1 / 16), (0.0, 1 / 8)),
    5: ((0.0, 1 / 2, 1 / 8, 1 / 32), (0.0, 1 / 4, 1 / 16, 1 / 64)),
}


@dataclass(frozen=True)
class Ternary(Levels):
    """scale · {−1, 0, 1} with the scale and zeros of least squared error; five weights to a byte, 1.6 bits each.

    Of the k largest weights of a row in magnitude, the best scale is their mean magnitude, and their share of the
    squares is (Σ|w|)² / k; the best k is found by trying all. Ternary Weight Networks (Li et al. 2016,
    arXiv:1605.04711) approximate that by a threshold of 0.7 of the mean.
    """

    granularity: Granularity = PerChannel(0)
    bits = 2

    @property
    def levels(self) -> tuple[float, ...]:
        return (0.0, 1.0, -1.0)

    def scale_of(self, rows: Tensor) -> Tensor:
        """The mean magnitude of the k largest weights of each row, for the best k."""
        sums = rows.double().abs().sort(dim=1, descending=True).values.cumsum(1)
        counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        best = (sums.square() / counts).argmax(1, keepdim=True)
        scale = (sums.gather(1, best) / counts[best]).squeeze(1).float()
        return torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), torch.ones_like(scale))

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and scales."""
        return -(-math.prod(shape) // 5) + 4 * math.prod(self.scale_shape(shape))

    def _pack(self, codes: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(codes.reshape(-1).long(), (0, -codes.numel() % 5)).reshape(-1, 5)
        return (flat * _POWERS.to(flat.device)).sum(1).to(torch.uint8)

    def _unpack(self, packed: Tensor, count: int) -> Tensor:
        digits = packed.long().unsqueeze(1) // _POWERS.to(packed.device) % 3
        return digits.reshape(-1)[:count].to(torch.uint8)


@dataclass(frozen=True)
class Binary(Levels):
    """scale · {−1, 1}, the scale being the mean magnitude, which has the least squared error; one bit each.

    There is no zero: a weight that is exactly zero becomes −scale, except in a row of nothing but zeros, whose scale is
    the smallest there is; pruned layers are refused. Source: XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279, eq. 6.
    """

    granularity: Granularity = PerChannel(0)
    bits = 1

    @property
    def levels(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    def scale_of(self, rows: Tensor) -> Tensor:
        """The mean magnitude of each row."""
        return rows.double().abs().mean(1).float().clamp(min=SMALLEST_SCALE)


@dataclass(frozen=True)
class MidRise(Levels):
    """scale · {±1, ±3, …, ±(2^b − 1)}: equal steps around zero, which lies between two levels; b bits, 2 to 7.

    Where `Int` has as many levels as codes but one of them at zero and one more below than above, this grid is
    symmetric: of normally distributed weights in 2 bits the squared error is .119 of theirs for .150, in 3 bits .038
    for .041. Its levels are integers of 8 bits, and runtimes compute with them as such. There is no zero: pruned layers
    are refused. `Quantize` takes the scales of least squared error, but with `ranges.MinMax`.
    Source: the mid-rise quantizer of Gersho and Gray, Vector Quantization and Signal Compression (1992), section 5.5;
    for weights, ParetoQ, Liu et al. 2025 (arXiv:2502.02631).
    """

    step: ClassVar[int | None] = 2
    bits: int = 2
    granularity: Granularity = PerChannel(0)

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 7:
            raise ConfigError(f"MidRise(bits={self.bits!r}): bits is a whole number from 2 to 7.")

    @property
    def levels(self) -> tuple[float, ...]:
        highest = (1 << self.bits) - 1
        return tuple(float(level) for level in range(-highest, highest + 1, 2))

    @property
    def reach(self) -> float:
        """To the outer edge of the outermost cells, which are as wide as the others."""
        return float(1 << self.bits)

    def nearest(self, x: Tensor) -> Tensor:
        """2 ⌈x / 2⌉ − 1, clipped: halfway to the lower level."""
        highest = (1 << self.bits) - 1
        return (x / 2).ceil_().mul_(2).sub_(1).clamp_(-highest, highest)


#: Five digits of base 3 in a byte: 3⁵ = 243.
_POWERS = torch.tensor([1, 3, 9, 27, 81])
