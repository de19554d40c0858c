"""Floating point of eight and of four bits: FP8, and FP4 with scales of few bits for blocks, MXFP4 and NVFP4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.formats.base import Format, Granularity, PerChannel, PerGroup
from gracile.formats.granularity import from_rows, scale_shape, to_rows
from gracile.formats.integer import SMALLEST_SCALE, check_weight
from gracile.formats.levels import FP4
from gracile.formats.packing import packed_bytes

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class FP8(Format):
    """x ≈ scale · f, f of eight bits: e4m3 up to 448, e5m2 up to 57,344; the largest weight falls on the largest f.

    Tensors: "codes" uint8 in the weight's shape, the bits of f, "scale" float32 (see `scale_shape`), "shape" int64. For
    storage: runtimes get the decoded weight. Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """

    kind: str = "e4m3"
    granularity: Granularity = PerChannel(0)
    bits = 8

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"FP8(kind={self.kind!r}): 'e4m3' or 'e5m2'.")

    @property
    def levels(self) -> tuple[float, ...]:
        """All numbers f that there are, 0 once, in no order."""
        values = torch.arange(256, dtype=torch.uint8).view(_KINDS[self.kind]).float()
        return tuple(values[values.isfinite() & ((values != 0) | ~values.signbit())].tolist())

    def encode(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of a weight; NaN and infinities are refused (DataError). scale: None covers the largest weight."""
        check_weight(weight)
        shape, largest = scale_shape(self.granularity, tuple(weight.shape)), torch.finfo(_KINDS[self.kind]).max
        rows = to_rows(self.granularity, weight.detach().float())
        if scale is None:
            extreme = rows.abs().amax(1)
            scale = torch.where(extreme > 0, (extreme / largest).clamp(min=SMALLEST_SCALE), torch.ones_like(extreme))
        scale = scale.detach().to(weight.device, torch.float32).reshape(shape)
        floats = (rows / scale.reshape(-1, 1)).clamp(-largest, largest).to(_KINDS[self.kind])
        codes = from_rows(self.granularity, floats.view(torch.uint8), tuple(weight.shape))
        return {"codes": codes, "scale": scale, "shape": torch.tensor(weight.shape, dtype=torch.int64)}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32."""
        rows = to_rows(self.granularity, tensors["codes"]).view(_KINDS[self.kind]).float()
        shape = tuple(tensors["codes"].shape)
        return from_rows(self.granularity, rows * tensors["scale"].reshape(-1, 1), shape)

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and scales."""
        return math.prod(shape) + 4 * math.prod(scale_shape(self.granularity, tuple(shape)))


@dataclass(frozen=True)
class MXFP4(Format):
    """x ≈ 2^e · f, f of FP4 and e for 32 consecutive weights of a row: 4.25 bits per weight.

    e = floor(log2 max|x|) − 2, within [−127, 127]; what lies beyond 6 · 2^e is clipped to it, as the specification has
    it. Tensors: "codes" as FP4's, "exponent" uint8 [rows, ceil(columns / 32)] holding e + 127, "shape". For storage:
    runtimes get the decoded weight. Source: OCP Microscaling Formats specification 1.0.
    """

    bits = 4
    granularity: ClassVar[Granularity] = PerGroup(32)

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of FP4."""
        return FP4().levels

    def encode(self, weight: Tensor, exponent: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of a weight; NaN and infinities are refused (DataError). exponent: None finds it from the weights."""
        check_weight(weight)
        if exponent is None:
            rows = to_rows(self.granularity, weight.detach().float())
            # frexp is exact where a logarithm may round up to the next power: x = m · 2^n, 0.5 ≤ m < 1.
            _, power = torch.frexp(rows.abs().amax(1))
            exponent = (power - 3).clamp(-127, 127).add(127).to(torch.uint8)
        exponent = exponent.reshape(scale_shape(self.granularity, tuple(weight.shape)))
        encoded = FP4(self.granularity).encode(weight, powers_of_two(exponent))
        return {"codes": encoded["codes"], "exponent": exponent, "shape": encoded["shape"]}

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32."""
        return FP4(self.granularity).decode({**tensors, "scale": powers_of_two(tensors["exponent"])})

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and exponents."""
        return packed_bytes(math.prod(shape), 4) + math.prod(scale_shape(self.granularity, tuple(shape)))


@dataclass(frozen=True)
class NVFP4(Format):
    """x ≈ t · s · f, f of FP4, s of FP8 (e4m3) for 16 consecutive weights of a row, t for the tensor: 4.5 bits each.

    t = max|x| / (6 · 448), s = max|x of the block| / (6 t) to its nearest e4m3, and no less than the smallest of these.
    Tensors: "codes" as FP4's, "scale_codes" uint8 [rows, ceil(columns / 16)], the bits of s, "tensor_scale" float32 [],
    "shape". For storage: runtimes get the decoded weight. Source: NVIDIA's description of the format (2025).
    """

    bits = 4
    granularity: ClassVar[Granularity] = PerGroup(16)

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of FP4."""
        return FP4().levels

    def encode(
        self, weight: Tensor, scale_codes: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Codes of a weight; NaN and infinities are refused (DataError). None finds the scales from the weights."""
        check_weight(weight)
        rows = to_rows(self.granularity, weight.detach().float())
        shape, largest = scale_shape(self.granularity, tuple(weight.shape)), torch.finfo(torch.float8_e4m3fn).max
        if tensor_scale is None:
            tensor_scale = (rows.abs().max() / 6 / largest).clamp(min=SMALLEST_SCALE)
        tensor_scale = tensor_scale.detach().to(weight.device, torch.float32)
        if scale_codes is None:
            wanted = (rows.abs().amax(1) / 6 / tensor_scale).clamp(SMALLEST_E4M3, largest)
            scale_codes = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
        scale_codes = scale_codes.reshape(shape)
        encoded = FP4(self.granularity).encode(weight, of_e4m3(scale_codes, tensor_scale))
        return {
            "codes": encoded["codes"],
            "scale_codes": scale_codes,
            "tensor_scale": tensor_scale,
            "shape": encoded["shape"],
        }

    def decode(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, float32."""
        scale = of_e4m3(tensors["scale_codes"], tensors["tensor_scale"])
        return FP4(self.granularity).decode({"codes": tensors["codes"], "shape": tensors["shape"], "scale": scale})

    def size_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of codes and scales."""
        return packed_bytes(math.prod(shape), 4) + math.prod(scale_shape(self.granularity, tuple(shape))) + 4


#: The smallest positive number of e4m3, a denormal.
SMALLEST_E4M3 = 2.0**-9


def of_e4m3(codes: Tensor, tensor_scale: Tensor) -> Tensor:
    """Scales that the bits of e4m3 numbers, times that of the tensor, stand for; float32, none of them 0."""
    return (codes.view(torch.float8_e4m3fn).float() * tensor_scale).clamp(min=torch.finfo(torch.float32).tiny / 512)


def powers_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent − 127), float32; the smallest is a denormal, exact as well."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.to(torch.int32) - 127)
