"""FPGM: units by how unlike the others they are (filter pruning via geometric median)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.criteria.base import CannotScoreError, Units


@dataclass(frozen=True)
class FPGM:
    """score[u] = Σ_j ‖F_u − F_j‖₂ over all units j of the group, F_u the weights that make unit u.

    The lowest lie nearest to the geometric median of the filters, which the others can stand in for. Where several
    layers make the same units, as in a residual stream, the sum is over those layers. Raises CannotScoreError where no
    weight matrix makes them.
    Source: He et al. 2019, arXiv:1811.00250.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    comparable: ClassVar[bool] = False

    def unit_scores(self, units: Units) -> Tensor:
        if not units.makers:
            raise CannotScoreError("FPGM: no weight matrix makes its units")
        return torch.stack([_distances(filters.double()).sum(1) for filters in units.makers]).sum(0)


def _distances(filters: Tensor) -> Tensor:
    """[n, n], by differences: the shortcut over products loses what equal filters have in common."""
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
