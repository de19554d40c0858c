"""Steps: what changes a model."""

from __future__ import annotations

from gracile.steps.distill import Distill, Finetune
from gracile.steps.factorize import Factorize
from gracile.steps.optimizers import SGD, AdamW
from gracile.steps.prune import Prune
from gracile.steps.quantize import Quantize
from gracile.steps.schedules import Gradual, Iterative

__all__ = ["SGD", "AdamW", "Distill", "Factorize", "Finetune", "Gradual", "Iterative", "Prune", "Quantize"]
