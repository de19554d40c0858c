"""Losses: between student and teacher (objects), and to the true labels (functions for `Data(loss=...)`)."""

from __future__ import annotations

from gracile.losses.base import DistillationLoss
from gracile.losses.cosine import CosineDistance
from gracile.losses.hard_labels import HardLabels
from gracile.losses.hint import Hint
from gracile.losses.labelled import binary_cross_entropy, cross_entropy, mean_squared_error, next_token_cross_entropy
from gracile.losses.soft_labels import SoftLabels
from gracile.losses.squared_error import MeanSquaredError

__all__ = [
    "CosineDistance",
    "DistillationLoss",
    "HardLabels",
    "Hint",
    "MeanSquaredError",
    "SoftLabels",
    "binary_cross_entropy",
    "cross_entropy",
    "mean_squared_error",
    "next_token_cross_entropy",
]
