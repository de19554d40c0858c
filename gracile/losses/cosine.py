"""Cosine distance: the direction of an embedding as the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from gracile.losses.base import DistillationLoss, matched


@dataclass(frozen=True)
class CosineDistance(DistillationLoss):
    """1 − cos(student, teacher) over the last dimension, mean over examples and positions.

    student, teacher: [..., dimensions]. Lengths do not count, as in retrieval and sentence similarity. A zero vector
    has distance 1 to everything.
    """

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        ours, theirs = matched(self, student, teacher)
        return (1 - functional.cosine_similarity(ours, theirs, dim=-1)).mean()
