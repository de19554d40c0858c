"""BatchNormScale: units by the factor that batch norm gives them (network slimming)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.criteria.base import CannotScoreError, Units


@dataclass(frozen=True)
class BatchNormScale:
    """score[u] = Σ |γ| over the batch norms that unit u passes, and over its positions in them.

    Meant for a net trained with an L1 penalty on γ, which drives those of idle channels to 0. Units of a residual
    stream pass several batch norms, and the sum is over all of them; the paper has one for each. Raises
    CannotScoreError where there is no batch norm with a scale.
    Source: Liu et al. 2017, arXiv:1708.06519.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    comparable: ClassVar[bool] = False

    def unit_scores(self, units: Units) -> Tensor:
        if not units.norm_scales:
            raise CannotScoreError("BatchNormScale: its units pass no batch norm with a scale")
        return torch.stack([scale.double().abs().sum(1) for scale in units.norm_scales]).sum(0)
