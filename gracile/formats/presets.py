"""Schemes by their usual names: which format a layer's weight and its input take."""

from __future__ import annotations

from dataclasses import dataclass

from gracile.formats.base import Format, PerChannel, PerGroup, PerTensor, PerToken
from gracile.formats.integer import Int


@dataclass(frozen=True)
class Scheme:
    """Number formats of the layers of a model.

    name: what targets know it by. weight: of a layer. input: None leaves the layer's input in floating point.
    ends: what the first and the last layer take in its place, which few bits harm most; None: the same as the others.
    """

    name: str
    weight: Format
    input: Format | None = None
    ends: Scheme | None = None


def _activations(bits: int) -> Int:
    return Int(bits, PerTensor(), symmetric=False)


#: int8 weights, one scale per output channel; uint8 inputs, one measured scale per layer.
W8A8 = Scheme("W8A8", Int(8, PerChannel(0)), _activations(8))

#: The same with weights of 7 bits, for x86 processors without VNNI: their int8 kernels add two products in 16 bits,
#: which 8-bit weights overflow.
W7A8 = Scheme("W7A8", Int(7, PerChannel(0)), _activations(8))

#: The same without measured ranges: every token's inputs get a scale of their own when the model runs. Needs no data;
#: of linear layers, while others keep floating-point inputs.
W8A8Dynamic = Scheme("W8A8-dynamic", Int(8, PerChannel(0)), Int(8, PerToken()))
W7A8Dynamic = Scheme("W7A8-dynamic", Int(7, PerChannel(0)), Int(8, PerToken()))

#: int8 weights, one scale per output channel; inputs stay in floating point.
W8A16 = Scheme("W8A16", Int(8, PerChannel(0)))

#: Fewer bits, one scale per output channel for weights and one per layer for inputs; the first and last layer in W8A8.
#: Kernels compute them as 8-bit integers: the file is smaller, the model no faster than W8A8.
W4A8 = Scheme("W4A8", Int(4, PerChannel(0)), _activations(8), ends=W8A8)
W3A8 = Scheme("W3A8", Int(3, PerChannel(0)), _activations(8), ends=W8A8)
W2A8 = Scheme("W2A8", Int(2, PerChannel(0)), _activations(8), ends=W8A8)
W4A4 = Scheme("W4A4", Int(4, PerChannel(0)), _activations(4), ends=W8A8)
W3A3 = Scheme("W3A3", Int(3, PerChannel(0)), _activations(3), ends=W8A8)
W2A2 = Scheme("W2A2", Int(2, PerChannel(0)), _activations(2), ends=W8A8)


def W4A16(group: int = 128, *, symmetric: bool = True) -> Scheme:
    """int4 weights, one scale per `group` consecutive weights of a row; inputs stay in floating point."""
    return Scheme("W4A16", Int(4, PerGroup(group), symmetric=symmetric))


def W3A16(group: int = 128, *, symmetric: bool = True) -> Scheme:
    """int3 weights, grouped as in `W4A16`."""
    return Scheme("W3A16", Int(3, PerGroup(group), symmetric=symmetric))


def W2A16(group: int = 128, *, symmetric: bool = True) -> Scheme:
    """int2 weights, grouped as in `W4A16`."""
    return Scheme("W2A16", Int(2, PerGroup(group), symmetric=symmetric))
