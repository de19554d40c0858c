"""What a distillation loss is, and the checks that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from gracile.data import logits_of
from gracile.errors import ConfigError


class DistillationLoss(ABC):
    """(student outputs, teacher outputs) -> scalar. Members are frozen dataclasses.

    Outputs are what the models returned: a tensor, or an object whose main tensor `logits_of` finds. All arithmetic is
    float32, the mean is over examples and positions, and no gradient reaches the teacher.
    """

    @abstractmethod
    def __call__(self, student: Any, teacher: Any) -> Tensor: ...


def matched(loss: DistillationLoss, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Student and teacher outputs as float32 tensors of one shape, the teacher's detached; else ConfigError."""
    ours, theirs = logits_of(student), logits_of(teacher).detach()
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"{type(loss).__name__}: the student's outputs have shape {tuple(ours.shape)}, the teacher's "
            f"{tuple(theirs.shape)}.\n  A teacher must have the student's classes and positions: pass another teacher."
        )
    return ours.float(), theirs.to(ours.device).float()


def matched_logits(loss: DistillationLoss, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """`matched`, as [n, classes] with all leading dimensions flattened; ConfigError for fewer than two classes."""
    ours, theirs = matched(loss, student, teacher)
    if ours.ndim == 0 or ours.shape[-1] < 2:
        raise ConfigError(
            f"{type(loss).__name__}: outputs of shape {tuple(ours.shape)} hold no choice between classes.\n"
            f"  Use MeanSquaredError() for a single output, or CosineDistance() for embeddings."
        )
    return ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1])
