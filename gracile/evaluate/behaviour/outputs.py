"""Behaviour of a model whose outputs are not classes: how far they moved, in length and in direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.evaluate.behaviour.examples import ExampleChange, MostChanged


@dataclass(frozen=True, kw_only=True)
class OutputBehaviour:
    """How outputs that are not classes changed.

    relative_error: ‖after - before‖ / ‖before‖ over all outputs. largest_error: the largest absolute difference.
    cosine: mean cosine similarity of an example's outputs; None where each is one number.
    """

    examples: int
    relative_error: float
    largest_error: float
    cosine: float | None
    most_changed: tuple[ExampleChange, ...]


class OutputMeter:
    """Sums over batches from which `result` computes the OutputBehaviour of all of them; `examples` are kept."""

    def __init__(self, examples: int) -> None:
        self._top = MostChanged(examples)
        self._difference = self._norm = self._largest = self._cosine = 0.0
        self._count = 0
        self._scalar = True

    def update(self, before: Tensor, after: Tensor, offset: int) -> None:
        """Add a batch: outputs of both models, and the place in the data of its first example."""
        a, b = before.reshape(len(before), -1), after.reshape(len(after), -1)
        difference = (b - a).square().sum(dim=1)
        norm = a.square().sum(dim=1)
        self._difference += float(difference.sum())
        self._norm += float(norm.sum())
        self._largest = max(self._largest, float((b - a).abs().max())) if a.numel() else self._largest
        self._cosine += float(torch.nn.functional.cosine_similarity(a, b, dim=1).sum())
        self._count += len(a)
        self._scalar = self._scalar and a.shape[1] == 1
        shift = (difference / norm.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        for i in self._top.candidates(shift):
            self._top.add(ExampleChange(index=offset + i, shift=float(shift[i])))

    def result(self) -> OutputBehaviour:
        """Behaviour over the examples added so far."""
        return OutputBehaviour(
            examples=self._count,
            relative_error=(self._difference / self._norm) ** 0.5 if self._norm else float(self._difference > 0),
            largest_error=self._largest,
            cosine=None if self._scalar else self._cosine / self._count,
            most_changed=self._top.items(),
        )
