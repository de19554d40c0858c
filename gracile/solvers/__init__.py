"""Solvers: weights that remain, and grid points they are rounded to, chosen by what a layer's output loses."""

from __future__ import annotations

from gracile.solvers.adaround import AdaRound
from gracile.solvers.base import Moments
from gracile.solvers.block_rounding import BlockSolver
from gracile.solvers.gptq import GPTQ
from gracile.solvers.least_squares import LeastSquares
from gracile.solvers.low_rank import LowRank
from gracile.solvers.rounding import Grid, Rounded, RoundingProblem, RoundingSolver
from gracile.solvers.sign_round import SignRound
from gracile.solvers.spatial_low_rank import SpatialLowRank

__all__ = [
    "GPTQ",
    "AdaRound",
    "BlockSolver",
    "Grid",
    "LeastSquares",
    "LowRank",
    "Moments",
    "Rounded",
    "RoundingProblem",
    "RoundingSolver",
    "SignRound",
    "SpatialLowRank",
]
