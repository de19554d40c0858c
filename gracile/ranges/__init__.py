"""Ranges: which part of the values a tensor takes is represented finely, and which is clipped."""

from __future__ import annotations

from gracile.ranges.automatic import Automatic
from gracile.ranges.base import Range
from gracile.ranges.entropy import Entropy
from gracile.ranges.min_max import MinMax
from gracile.ranges.moving_average import MovingAverage
from gracile.ranges.mse import MSE
from gracile.ranges.percentile import Percentile

__all__ = ["MSE", "Automatic", "Entropy", "MinMax", "MovingAverage", "Percentile", "Range"]
