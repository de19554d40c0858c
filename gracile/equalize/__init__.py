"""Equalization: scales moved between a layer's inputs and its weight, so that both fit their grids better."""

from __future__ import annotations

from gracile.equalize.cross_layer import CrossLayer
from gracile.equalize.input_scales import AWQ, InputScales, SmoothQuant

__all__ = ["AWQ", "CrossLayer", "InputScales", "SmoothQuant"]
