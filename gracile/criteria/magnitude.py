"""Magnitude: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class Magnitude:
    """score = |w|^power.

    power: the order among single weights does not depend on it. Summed over a channel, 1 ranks by the L1 norm and 2 by
    the squared L2 norm of its weights.
    Source: Han et al. 2015, arXiv:1506.02626; for filters, Li et al. 2017, arXiv:1608.08710.
    """

    power: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ConfigError(f"Magnitude(power={self.power}): must be positive, or larger weights would go first.")

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        scores = weight.detach().float().abs()
        return scores if self.power == 1 else scores.pow(self.power)
