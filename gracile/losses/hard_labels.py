"""Hard labels: the teacher's decision as if it were the true label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from gracile.losses.base import DistillationLoss, matched_logits


@dataclass(frozen=True)
class HardLabels(DistillationLoss):
    """CE(argmax teacher, student) = −log softmax(student)[argmax teacher], mean over examples and positions.

    student, teacher: [..., classes]. Of equal teacher logits the first class counts.
    Source: the hard-label distillation of Touvron et al. 2021, arXiv:2012.12877, eq. 3.
    """

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        ours, theirs = matched_logits(self, student, teacher)
        return functional.cross_entropy(ours, theirs.argmax(dim=-1))
