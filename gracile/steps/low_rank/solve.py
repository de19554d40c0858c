"""Factors of one layer, by the solver that the form of its rank asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from gracile.solvers import Moments
from gracile.solvers.low_rank import Decomposition
from gracile.solvers.spatial_low_rank import SpatialDecomposition
from gracile.steps.low_rank.select import Candidate

if TYPE_CHECKING:
    from gracile.steps.factorize import Factorize


def decompose(
    step: Factorize,
    candidate: Candidate,
    prior: Tensor,
    moments: Moments,
    centre: bool,
    *,
    spatial: bool,
    roughly: bool = False,
) -> Decomposition | SpatialDecomposition:
    """The factors of every rank of this form. prior: [out, d]. roughly: without the sweeps, to compare ranks by."""
    if not spatial:
        return step.solver(prior, moments, centre)
    assert step.spatial is not None and candidate.kernel is not None
    solver = replace(step.spatial, sweeps=0) if roughly else step.spatial
    return solver(prior, moments, centre, candidate.kernel, candidate.transposed)
