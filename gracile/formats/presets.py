"""Schemes by their usual names: which format a layer's weight and its input take."""

from __future__ import annotations

from dataclasses import dataclass

from gracile.formats.base import Format, PerChannel, PerGroup, PerTensor
from gracile.formats.integer import Int


@dataclass(frozen=True)
class Scheme:
    """Number formats of one layer.

    name: what targets know it by. input: None leaves the layer's input in floating point.
    """

    name: str
    weight: Format
    input: Format | None = None


#: int8 weights, one scale per output channel; uint8 inputs, one measured scale per layer.
W8A8 = Scheme("W8A8", Int(8, PerChannel(0)), Int(8, PerTensor(), symmetric=False))

#: int8 weights, one scale per output channel; inputs stay in floating point.
W8A16 = Scheme("W8A16", Int(8, PerChannel(0)))


def W4A16(group: int = 128) -> Scheme:
    """int4 weights, one scale per `group` consecutive weights of a row; inputs stay in floating point."""
    return Scheme("W4A16", Int(4, PerGroup(group)))
