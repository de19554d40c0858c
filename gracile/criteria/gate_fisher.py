"""GateFisher: what single examples' losses would change if a whole unit were switched off, squared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gracile.criteria.base import CannotScoreError, Units


@dataclass(frozen=True)
class GateFisher:
    """score[u] = ½ E[(dL/dm_u)²] = ½ E[(Σ_S w · dL/dw)²], the mean over single examples.

    m_u = 1 is a gate on unit u, S are all weights that read it, and E[(dL/dm)²] is the diagonal of the gates' empirical
    Fisher matrix. The sum over the unit is taken before the square, so that weights which act together count together;
    `Taylor` and `Hessian` square first, as if they were independent. Raises CannotScoreError where no weight reads
    them.
    Source: Kwon et al. 2022, arXiv:2204.09656; Molchanov et al. 2019, arXiv:1906.10771, for gates on channels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gate_gradient_sq"})
    comparable: ClassVar[bool] = False

    def unit_scores(self, units: Units) -> Tensor:
        if units.gate_gradient_sq is None:
            raise CannotScoreError(
                "GateFisher: the statistic 'gate_gradient_sq' was not collected, or no weight reads it"
            )
        return 0.5 * units.gate_gradient_sq.double()
