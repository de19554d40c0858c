"""Hints: hidden states of the teacher as the target (feature distillation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.losses.base import DistillationLoss, matched

SMALLEST = 1e-12  # of a variance: hidden states that are all alike have no scale


@dataclass(frozen=True)
class Hint(DistillationLoss):
    """weight · mean((student − teacher)²) / Var(teacher), of what a layer gives; `Distill` takes the mean over layers.

    layers: name patterns of the modules that are compared, which both nets have with outputs of equal shapes. None: all
        modules made of others, such as residual blocks and encoder layers, of which that holds; in a model without any,
        its layers.
    weight: beside other losses in the sum.
    student, teacher: any one shape, of one module's outputs; mean and variance are over all elements.

    A layer's states say far more for an example than its logits, above all where the teacher knows the examples by
    heart: its logits are then much alike.
    Source: FitNets, Romero et al. 2015, arXiv:1412.6550, eq. 3, at several layers and without a regressor, the shapes
    being equal; the division by the variance, which puts layers on one scale, is ours.
    """

    layers: tuple[str, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.layers is not None and (not isinstance(self.layers, tuple) or not self.layers):
            raise ConfigError(f"Hint(layers={self.layers!r}): expected a tuple of name patterns, or None for all.")
        if not (isinstance(self.weight, (int, float)) and 0 < self.weight < float("inf")):
            raise ConfigError(f"Hint(weight={self.weight!r}): expected a positive number.")

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        ours, theirs = matched(self, student, teacher)
        scale = torch.linalg.vector_norm(theirs - theirs.mean()).square().clamp_min(SMALLEST * theirs.numel())
        distance: Tensor = _SquaredDistance.apply(ours, theirs)  # type: ignore[no-untyped-call]
        return self.weight * distance / scale


class _SquaredDistance(torch.autograd.Function):
    """‖a − b‖² and its gradient in a: states are large, and each pass over them that autograd adds takes its time."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        difference = ours - theirs
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradients[0]), None
