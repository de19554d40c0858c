"""Criteria: how much each weight, or each unit, matters. Any of them goes with any pattern and any allocation."""

from __future__ import annotations

from gracile.criteria.activation import Activation
from gracile.criteria.base import CannotScoreError, Consumer, Criterion, UnitCriterion, Units
from gracile.criteria.batch_norm_scale import BatchNormScale
from gracile.criteria.fpgm import FPGM
from gracile.criteria.gate_fisher import GateFisher
from gracile.criteria.gradient import Gradient
from gracile.criteria.hessian import Hessian
from gracile.criteria.magnitude import Magnitude
from gracile.criteria.obs import OBS
from gracile.criteria.random import Random
from gracile.criteria.taylor import Taylor

__all__ = [
    "FPGM",
    "OBS",
    "Activation",
    "BatchNormScale",
    "CannotScoreError",
    "Consumer",
    "Criterion",
    "GateFisher",
    "Gradient",
    "Hessian",
    "Magnitude",
    "Random",
    "Taylor",
    "UnitCriterion",
    "Units",
]
