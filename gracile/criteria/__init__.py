"""Criteria: how much each weight matters. Any of them goes with any pattern and any allocation."""

from __future__ import annotations

from gracile.criteria.base import Consumer, Criterion
from gracile.criteria.gradient import Gradient
from gracile.criteria.hessian import Hessian
from gracile.criteria.magnitude import Magnitude
from gracile.criteria.obs import OBS
from gracile.criteria.random import Random
from gracile.criteria.taylor import Taylor

__all__ = ["OBS", "Consumer", "Criterion", "Gradient", "Hessian", "Magnitude", "Random", "Taylor"]
