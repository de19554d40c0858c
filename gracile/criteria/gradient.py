"""Gradient: what the loss would change to first order, averaged before the magnitude is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gracile.criteria.base import statistic
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class Gradient:
    """score = |w · g|, g = E[dL/dw]: the size of the first-order change of the mean loss when w becomes 0.

    At a minimum of the training loss g is nearly 0, and so are these scores: `Taylor` averages squares of single
    examples, which do not cancel.
    Source: Mozer and Smolensky 1988 (skeletonization); as a pruning score, Lee et al. 2019, arXiv:1810.02340, eq. 6.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return (weight.detach().float() * statistic(self, stats, "gradient", weight)).abs()
