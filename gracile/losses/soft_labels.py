"""Soft labels: the teacher's probabilities as the target (Hinton distillation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from gracile.errors import ConfigError
from gracile.losses.base import DistillationLoss, matched_logits


@dataclass(frozen=True)
class SoftLabels(DistillationLoss):
    """τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ)), mean over examples and positions.

    temperature: τ > 0; higher shows more of how the teacher ranks the wrong classes. The factor τ² keeps gradients of
        the same size at every temperature.
    student, teacher: [..., classes].
    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < float("inf")):
            raise ConfigError(f"SoftLabels(temperature={self.temperature!r}): must be positive; 1 to 10 are usual.")

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        ours, theirs = matched_logits(self, student, teacher)
        log_student = functional.log_softmax(ours / self.temperature, dim=-1)
        log_teacher = functional.log_softmax(theirs / self.temperature, dim=-1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return self.temperature**2 * divergence
