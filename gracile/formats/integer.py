"""Uniform integers of 2 to 8 bits with one scale per tensor, channel or group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gracile.errors import ConfigError, DataError
from gracile.formats.base import Format, Granularity, PerChannel, PerTensor, PerToken
from gracile.formats.granularity import from_rows, scale_shape, to_rows
from gracile.formats.packing import pack_bits, packed_bytes, unpack_bits

#: Smallest normal float32. A runtime that flushes denormals to zero would divide by zero under a smaller scale.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

PER_OUTPUT_CHANNEL = PerChannel(0)


@dataclass(frozen=True)
class Int(Format):
    """x ≈ scale · (q − zero_point), q = clip(round(x / scale) + zero_point, qmin, qmax), rounding half to even.

    bits: 2 to 8.
    granularity: which weights share a scale.
    symmetric: q in [−2^(b−1), 2^(b−1)−1] and zero_point = 0. Below 8 bits a weight's scale has either sign: a negative
        one puts the level more that the grid has on one side above zero, where the row reaches farther. Otherwise q in
        [0, 2^b−1], and zero_point is the code of exactly 0, so padding and pruned weights stay exactly zero.

    Tensors: "codes" (8 bits: int8, or uint8 if asymmetric, in the weight's shape; fewer: uint8 [ceil(n·bits/8)], see
    `packing`), "scale" float32 (see `scale_shape`), "zero_point" int16 in the shape of scale (asymmetric only), "shape"
    int64 [ndim].
    """

    step: ClassVar[int | None] = 1
    bits: int = 8
    granularity: Granularity = PER_OUTPUT_CHANNEL
    symmetric: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"Int(bits={self.bits!r}): bits is a whole number from 2 to 8.")
        if not isinstance(self.granularity, Granularity):
            raise ConfigError(
                f"Int(granularity={self.granularity!r}): use PerTensor(), PerChannel(axis) or PerGroup(size)."
            )

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def scaled_by_output(self) -> bool:
        """Whether a sum of products with codes has one factor: no zero point, and a scale per output or per tensor."""
        return self.symmetric and self.granularity in (PER_OUTPUT_CHANNEL, PerTensor())

    @property
    def signed_scale(self) -> bool:
        """Whether the scale of a weight may be negative. In 8 bits it gains 1/255, and 128 is no int8."""
        return self.symmetric and self.bits < 8

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of "scale": [] per tensor, [size of axis] per channel, [rows, groups] per group."""
        return scale_shape(self.granularity, tuple(shape))

    def scale_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None if symmetric) that cover [low, high], extended to contain 0.

        low, high: the same shape, any. Symmetric: scale = max(|low|, |high|) / qmax. Asymmetric: scale =
        (high − low) / qmax, zero_point = round(−low / scale). A range of nothing but 0 gets scale 1.
        """
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.qmax
        else:
            scale = high / self.qmax - low / self.qmax  # divided first, so that huge ranges do not overflow
        scale = torch.where(low == high, torch.ones_like(scale), scale.clamp(min=SMALLEST_SCALE))
        if self.symmetric:
            return scale, None
        return scale, torch.round(-low / scale).clamp(self.qmin, self.qmax).to(torch.int16)

    def weight_scale_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `scale_of`, with a `signed_scale` where there is one: the least |scale| that covers both ends.

        The farther end takes the side of the lowest code: |scale| = max(far / −qmin, near / qmax), and it is negative
        where `high` is the farther. Source: the full-range symmetric grids of AutoRound (arXiv:2309.05516) and of
        llama.cpp's Q4_0, which clip the nearer end where it reaches beyond qmax · |scale|.
        """
        if not self.signed_scale:
            return self.scale_of(low, high)
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        far, near = torch.maximum(-low, high), torch.minimum(-low, high)
        scale = torch.maximum(far / -self.qmin, near / self.qmax).clamp(min=SMALLEST_SCALE)
        scale = torch.where(low == high, torch.ones_like(scale), scale)
        return torch.where(high > -low, -scale, scale), None

    def encode(
        self, weight: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Codes of a weight, by round to nearest.

        weight: any float dtype; NaN and infinities are refused (DataError).
        scale: shape `scale_shape(weight.shape)`; None covers the minimum and maximum, so that every weight decodes to
            within half a step of itself.
        zero_point: the shape of scale; None: the code of 0 in the range from minimum to maximum, which stays right
            when a narrower range is clipped by the same factor on both sides.
        """
        check_weight(weight)
        shape = self.scale_shape(weight.shape)
        self._check_given(shape, scale, zero_point)
        if scale is None or (zero_point is None and not self.symmetric):
            rows = to_rows(self.granularity, weight.detach().float())
            default, default_zero = self.weight_scale_of(rows.amin(dim=1), rows.amax(dim=1))
            scale = default.reshape(shape) if scale is None else scale
            if zero_point is None and default_zero is not None:
                zero_point = default_zero.reshape(shape)
        scale = scale.detach().to(weight.device, torch.float32)
        scale = scale.abs().clamp(min=SMALLEST_SCALE).copysign(scale)
        codes = self.quantize(weight.detach(), scale, zero_point)
        tensors = {"codes": codes if self.bits == 8 else pack_bits(codes, self.bits), "scale": scale}
        if zero_point is not None:
            tensors["zero_point"] = zero_point.to(weight.device, torch.int16)
        tensors["shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        return tensors

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32: scale · (q − zero_point)."""
        codes = tensors["codes"]
        if self.bits < 8:
            codes = self.unpack(codes, tuple(tensors["shape"].tolist()))
        return self.dequantize(codes, tensors["scale"], tensors.get("zero_point"))

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes, scales and zero points."""
        scales = math.prod(self.scale_shape(shape))
        return packed_bytes(math.prod(shape), self.bits) + scales * (4 if self.symmetric else 6)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """clip(round(x / scale) + zero_point, qmin, qmax) as int8 (symmetric) or uint8, in the shape of x.

        scale, zero_point: shape `scale_shape(x.shape)`, [] for the activations of a per-tensor format.
        """
        rows = to_rows(self.granularity, x.float())
        q = torch.round(rows / scale.reshape(-1, 1))
        if zero_point is not None:
            q = q + zero_point.reshape(-1, 1)
        q = q.clamp(self.qmin, self.qmax).to(torch.int8 if self.symmetric else torch.uint8)
        return from_rows(self.granularity, q, tuple(x.shape))

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """scale · (q − zero_point), float32, for unpacked codes of any integer dtype."""
        rows = to_rows(self.granularity, codes).float()
        if zero_point is not None:
            rows = rows - zero_point.reshape(-1, 1)
        return from_rows(self.granularity, rows * scale.reshape(-1, 1), tuple(codes.shape))

    def unpack(self, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Stored codes as int8 (symmetric) or uint8 of the weight's shape; at 8 bits they already are."""
        if self.bits == 8:
            return codes
        unsigned = unpack_bits(codes, self.bits, math.prod(shape)).reshape(shape)
        if not self.symmetric:
            return unsigned
        sign = 1 << (self.bits - 1)
        return (unsigned ^ sign).to(torch.int8) - sign  # extends the sign bit of a two's complement code

    def with_positive_scales(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Unpacked codes and scales of the same weight, no scale negative: codes of those that were are turned over.

        codes: int8 in the weight's shape, then up to 2^(b−1), which has no room in b bits. Of formats whose scales have
        one sign they are returned as they are.
        """
        if not self.signed_scale:
            return codes, scale
        rows = to_rows(self.granularity, codes) * scale.sign().to(codes.dtype).reshape(-1, 1)
        return from_rows(self.granularity, rows, tuple(codes.shape)), scale.abs()

    def _check_given(self, shape: tuple[int, ...], scale: Tensor | None, zero_point: Tensor | None) -> None:
        for name, given in (("scale", scale), ("zero_point", zero_point)):
            if given is not None and tuple(given.shape) != shape:
                raise ConfigError(
                    f"Int.encode({name}=...): expected shape {shape} for {self.granularity}, got {tuple(given.shape)}."
                )
        if scale is not None:
            wrong = ~torch.isfinite(scale) | (scale == 0 if self.signed_scale else scale <= 0)
            if bool(wrong.any()):
                kind = "finite and not zero" if self.signed_scale else "positive and finite"
                raise ConfigError(f"Int.encode(scale=...): every scale must be {kind}.")
        if zero_point is None:
            return
        if self.symmetric or scale is None:
            raise ConfigError("Int.encode(zero_point=...): goes with a scale, in a format with symmetric=False.")
        if bool(((zero_point < self.qmin) | (zero_point > self.qmax)).any()):
            raise ConfigError(f"Int.encode(zero_point=...): must lie in [{self.qmin}, {self.qmax}].")


def is_dynamic(fmt: Format | None) -> bool:
    """Whether the scales of an input format are found when the model runs."""
    return isinstance(fmt, Int) and isinstance(fmt.granularity, PerToken)


def check_weight(weight: Tensor) -> None:
    """Refuse a weight that is no floating point or not finite: DataError."""
    if not weight.is_floating_point():
        raise DataError(f"A weight of dtype {weight.dtype} cannot be encoded: it is not floating point.")
    finite = torch.isfinite(weight.detach().float())
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise DataError(
            f"A weight of shape {tuple(weight.shape)} has {bad} values that are NaN, infinite or beyond float32.\n"
            f"  The model was damaged before compression; check the checkpoint it came from."
        )
