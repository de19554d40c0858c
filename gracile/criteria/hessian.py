"""Hessian: the loss that removing one weight costs to second order (Optimal Brain Damage)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gracile.criteria.base import statistic
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class Hessian:
    """score = ½ · w² · H_ii, with H_ii the diagonal of the loss's Hessian at the trained weights.

    hutchinson_probes: None takes the empirical Fisher, H_ii = E[(dL/dw_i)²] over single examples, which is never
        negative and needs one gradient per example. A number estimates d²L/dw² itself by as many random ±1 vectors a
        batch; each costs a second backward pass.

    Estimates of curvature below 0 count as 0. Optimal Brain Damage expands around a minimum, where no curvature is
    negative; a negative estimate is noise or an untrained direction, and would promise a gain that removal does not
    bring.
    Source: LeCun, Denker and Solla 1989, eq. 5; Hutchinson 1990 for the estimate.
    """

    hutchinson_probes: int | None = None

    def __post_init__(self) -> None:
        if self.hutchinson_probes is not None and self.hutchinson_probes < 1:
            raise ConfigError(f"Hessian(hutchinson_probes={self.hutchinson_probes}): at least 1, or None for Fisher.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient_sq" if self.hutchinson_probes is None else "hessian_diagonal"})

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        (name,) = self.needs
        curvature = statistic(self, stats, name, weight).clamp(min=0)
        return 0.5 * weight.detach().float().square() * curvature
