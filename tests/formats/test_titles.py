"""Formats as a person reads them."""

from __future__ import annotations

import pytest

from gracile.formats import FP8, NF4, FixedPoint, Format, Int, PerGroup, PerTensor, PerToken, format_title


@pytest.mark.parametrize(
    ("fmt", "title"),
    [
        (Int(4), "int4 per channel"),
        (Int(8, PerTensor(), symmetric=False), "uint8 per tensor"),
        (Int(8, PerToken()), "int8 per token"),
        (NF4(PerGroup(32)), "NF4 per group of 32"),
        (FixedPoint(256), "FixedPoint"),
        (FP8(), "FP8 per channel"),
    ],
)
def test_titles(fmt: Format, title: str) -> None:
    assert format_title(fmt) == title
