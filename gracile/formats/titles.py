"""Formats as a person reads them."""

from __future__ import annotations

from gracile.formats.base import Format, Granularity, PerChannel, PerGroup, PerTensor, PerToken
from gracile.formats.integer import Int

_GRANULARITIES: dict[type[Granularity], str] = {
    PerTensor: "per tensor",
    PerChannel: "per channel",
    PerToken: "per token",
}


def format_title(fmt: Format) -> str:
    """Numbers and what shares a scale: "int4 per group of 32", "uint8 per tensor" (asymmetric), "NF4 per channel"."""
    name = f"{'' if fmt.symmetric else 'u'}int{fmt.bits}" if isinstance(fmt, Int) else type(fmt).__name__
    granularity = getattr(fmt, "granularity", None)
    if isinstance(granularity, PerGroup):
        return f"{name} per group of {granularity.size}"
    return " ".join([name, *([_GRANULARITIES[type(granularity)]] if granularity is not None else [])])
