from __future__ import annotations

import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import FixedPoint


def test_by_hand() -> None:
    fmt = FixedPoint(factor=4)
    tensors = fmt.encode(torch.tensor([0.3, -0.3, 0.125, 0.375, 1.0, 0.0]))
    # 1.2, -1.2, 0.5 and 1.5 (to even), 4, 0
    assert tensors["codes"].tolist() == [1, -1, 0, 2, 4, 0]
    assert fmt.decode(tensors).tolist() == [0.25, -0.25, 0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(0.4, torch.int8), (-0.5, torch.int8), (0.5, torch.int16), (127.9, torch.int16), (200.0, torch.int32)],
)
def test_codes_take_the_smallest_integer_that_holds_them(largest: float, dtype: torch.dtype) -> None:
    assert FixedPoint(256).encode(torch.tensor([0.1, largest]))["codes"].dtype == dtype


def test_a_code_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="overflow 32 bits"):
        FixedPoint(256).encode(torch.tensor([1e9]))


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), "256", True])
def test_impossible_factors_are_refused(factor: object) -> None:
    with pytest.raises(ConfigError):
        FixedPoint(factor)  # type: ignore[arg-type]
