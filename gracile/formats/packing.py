"""Codes of 1 to 8 bits packed into bytes without gaps, as one little-endian bit stream."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count · bits / 8)."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes: bit k of code i is bit i·bits + k of one stream, bit j of byte b is its bit 8·b + j.

    codes: any shape and integer dtype; the low `bits` bits of each are kept, so negative codes are two's complement.
    Returns uint8 [ceil(n · bits / 8)]; unused bits of the last byte are zero. At 4 bits the low nibble comes first,
    which is the layout of ONNX INT4 and UINT4.
    """
    flat = codes.reshape(-1)
    count = flat.numel()
    octets = -(-count // 8)  # eight codes fill exactly `bits` bytes
    mask = (1 << bits) - 1
    padded = torch.zeros(octets * 8, dtype=torch.uint8, device=codes.device)
    padded[:count] = (flat & mask).to(torch.uint8)
    if bits == 8:
        return padded[:count]
    padded = padded.reshape(octets, 8)
    words = torch.zeros(octets, dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= padded[:, i].to(torch.int64) << (bits * i)
    packed = torch.stack([((words >> (8 * b)) & 255).to(torch.uint8) for b in range(bits)], dim=1)
    return packed.reshape(-1)[: packed_bytes(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack_bits` packed: uint8 [count], unsigned."""
    if bits == 8:
        return packed[:count]
    octets = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, octets * bits - packed.numel())).reshape(octets, bits)
    words = torch.zeros(octets, dtype=torch.int64, device=packed.device)
    for b in range(bits):
        words = words | (padded[:, b].to(torch.int64) << (8 * b))
    mask = (1 << bits) - 1
    codes = torch.stack([((words >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=1)
    return codes.reshape(-1)[:count]
