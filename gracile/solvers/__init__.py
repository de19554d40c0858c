"""Solvers: closed forms that choose the weights which remain."""

from __future__ import annotations

from gracile.solvers.base import Moments
from gracile.solvers.least_squares import LeastSquares
from gracile.solvers.low_rank import LowRank
from gracile.solvers.spatial_low_rank import SpatialLowRank

__all__ = ["LeastSquares", "LowRank", "Moments", "SpatialLowRank"]
