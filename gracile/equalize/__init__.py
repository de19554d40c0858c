"""Equalization: scales moved between a layer's inputs and its weight, so that both fit their grids better."""

from __future__ import annotations

from gracile.equalize.cross_layer import CrossLayer
from gracile.equalize.smooth_quant import SmoothQuant

__all__ = ["CrossLayer", "SmoothQuant"]
