"""Mean squared error to the teacher, for regression outputs and embeddings whose length matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from gracile.losses.base import DistillationLoss, matched


@dataclass(frozen=True)
class MeanSquaredError(DistillationLoss):
    """mean((student − teacher)²) over all elements. student, teacher: any one shape."""

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        return functional.mse_loss(*matched(self, student, teacher))
