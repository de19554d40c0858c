"""Which grid a format is, and the codes of a weight that is rounded to nearest on it."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.formats import FP8, MXFP4, NVFP4, Codebook, FixedPoint, Format, Int, Levels, MidRise
from gracile.formats.granularity import to_rows
from gracile.ranges import MinMax
from gracile.ranges.base import Range
from gracile.steps.quantization.grids.base import FormatGrid
from gracile.steps.quantization.grids.codebook import CodebookGrid
from gracile.steps.quantization.grids.integer import FixedPointGrid, IntGrid
from gracile.steps.quantization.grids.levels import LevelGrid
from gracile.steps.quantization.grids.micro_float import MXFP4Grid, NVFP4Grid


def grid_of(fmt: Format, ranges: Range, encoded: dict[str, Tensor]) -> FormatGrid:
    """The grid of a weight in the format. encoded: its tensors, rounded to nearest."""
    if isinstance(fmt, Int):
        return IntGrid(fmt, ranges)
    if isinstance(fmt, (Levels, FP8)):
        return LevelGrid(fmt)
    if isinstance(fmt, MXFP4):
        return MXFP4Grid(fmt)
    if isinstance(fmt, NVFP4):
        return NVFP4Grid(fmt, encoded["tensor_scale"])
    if isinstance(fmt, FixedPoint):
        return FixedPointGrid(fmt)
    assert isinstance(fmt, Codebook), f"{fmt} has no grid"
    return CodebookGrid(fmt, encoded["levels"])


def nearest_codes(weight: Tensor, fmt: Format, ranges: Range) -> dict[str, Tensor]:
    """The weight by its nearest codes, on the grid that the range finds; of a mid-rise one, on that of least error.

    Raises ConfigError for values that the format does not reach.
    """
    if isinstance(fmt, Int):
        return fmt.encode(weight, ranges.weight(weight, fmt))
    if isinstance(fmt, MidRise) and not isinstance(ranges, MinMax):
        return fmt.encode(weight, _least_error_scale(fmt, weight))
    return fmt.encode(weight)


def _least_error_scale(fmt: Levels, weight: Tensor) -> Tensor:
    """Scales of the weight, float32 of `fmt.scale_shape(weight.shape)`: of least squared error of those tried."""
    rows = to_rows(fmt.granularity, weight.detach().float())
    scale, _ = LevelGrid(fmt).fit_rows(rows, torch.ones_like(rows))
    return scale.reshape(fmt.scale_shape(weight.shape))
