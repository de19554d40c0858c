"""Formats as the grids that a rounding solver works on."""

from __future__ import annotations

from gracile.steps.quantization.grids.base import FormatGrid
from gracile.steps.quantization.grids.codebook import CodebookGrid
from gracile.steps.quantization.grids.integer import FixedPointGrid, IntGrid
from gracile.steps.quantization.grids.levels import LevelGrid
from gracile.steps.quantization.grids.micro_float import MXFP4Grid, NVFP4Grid
from gracile.steps.quantization.grids.of_format import grid_of, nearest_codes

__all__ = [
    "CodebookGrid",
    "FixedPointGrid",
    "FormatGrid",
    "IntGrid",
    "LevelGrid",
    "MXFP4Grid",
    "NVFP4Grid",
    "grid_of",
    "nearest_codes",
]
