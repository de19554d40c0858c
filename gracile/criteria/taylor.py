"""Taylor: the squared first-order change of single examples' losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gracile.criteria.base import statistic
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class Taylor:
    """score = E[(w · dL/dw)²] = w² · E[(dL/dw)²], the mean over single examples.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8, which squares the mean over a minibatch; the square of each
    example is taken here, so that the score does not depend on the batch size. Summed over a channel this is their
    score with weights taken as independent.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_sq"})

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.detach().float().square() * statistic(self, stats, "gradient_sq", weight)
