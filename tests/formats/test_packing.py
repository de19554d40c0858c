from __future__ import annotations

import pytest
import torch

from gracile.formats.packing import pack_bits, packed_bytes, unpack_bits


def packed_by_hand(codes: list[int], bits: int) -> bytes:
    """One big integer is the whole bit stream."""
    stream = sum((code & ((1 << bits) - 1)) << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 15, 64, 101])
def test_bytes_equal_one_big_integer_and_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(bits * 1000 + count))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == packed_by_hand(codes.tolist(), bits)
    assert packed.numel() == packed_bytes(count, bits)
    assert unpack_bits(packed, bits, count).tolist() == codes.tolist()


def test_negative_codes_are_twos_complement_with_the_low_nibble_first() -> None:
    packed = pack_bits(torch.tensor([[-8, 7], [-1, 1], [3, 0]], dtype=torch.int8), 4)
    assert packed.tolist() == [0x78, 0x1F, 0x03]


def test_an_empty_tensor_packs_to_nothing() -> None:
    assert pack_bits(torch.zeros(0, dtype=torch.int8), 3).numel() == 0
    assert unpack_bits(torch.zeros(0, dtype=torch.uint8), 3, 0).numel() == 0
