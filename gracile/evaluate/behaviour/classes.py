"""Behaviour of a classifier: flips in both directions, divergence, calibration, and accuracy of each class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.evaluate.behaviour.calibration import Calibration, CalibrationMeter
from gracile.evaluate.behaviour.examples import ExampleChange, MostChanged


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """Accuracy on the examples of one class, before and after."""

    label: int
    examples: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class ClassBehaviour:
    """How predicted classes changed, over all labelled predictions.

    right_to_wrong, wrong_to_right: how many predictions became wrong, and right. changed: how many differ at all, from
    one wrong class to another included. kl: mean KL(before || after) of the predicted distributions, in nats.
    classes: those whose accuracy moved most (by change · √examples, so that a rare class neither leads by chance nor
    hides).
    """

    examples: int
    right_to_wrong: int
    wrong_to_right: int
    changed: int
    kl: float
    before: Calibration
    after: Calibration
    classes: tuple[ClassChange, ...]
    most_changed: tuple[ExampleChange, ...]


class ClassMeter:
    """Sums over batches from which `result` computes the ClassBehaviour of all of them; `examples` are kept."""

    def __init__(self, examples: int) -> None:
        self._top = MostChanged(examples)
        self._before, self._after = CalibrationMeter(), CalibrationMeter()
        self._flips = torch.zeros(3, dtype=torch.int64)
        self._per_class = torch.zeros(3, 0, dtype=torch.int64)  # examples, right before, right after
        self._kl = 0.0
        self._count = 0
        self._probabilities: bool | None = None  # decided on the first batch, for both models

    def update(self, before: Tensor, after: Tensor, labels: Tensor, offset: int) -> None:
        """Add a batch: outputs of both models, their labels, and the place in the data of its first example."""
        if self._probabilities is None:
            self._probabilities = _are_probabilities(_class_rows(before, labels))
        first, second = (self._log_probabilities(_class_rows(outputs, labels)) for outputs in (before, after))
        width = len(first) // len(before)  # predictions per example: tokens or pixels
        flat = labels.flatten()
        kept = ((flat >= 0) & (flat < first.shape[1])).nonzero()[:, 0]  # -100 and the like mark what does not count
        first, second, flat = first[kept], second[kept], flat[kept]
        if not len(flat):
            return
        p, q = first.exp(), second.exp()
        was, now = p.argmax(dim=1), q.argmax(dim=1)
        right, still = was == flat, now == flat
        self._flips += torch.stack(((right & ~still).sum(), (~right & still).sum(), (was != now).sum()))
        self._kl += float(torch.where(p > 0, p * (first - second), 0.0).sum())  # 0 log 0 = 0, also for logits of -inf
        self._count += len(flat)
        self._before.update(first, flat)
        self._after.update(second, flat)
        self._count_classes(flat, right, still, first.shape[1])
        shift = (p - q).abs().sum(dim=1) / 2
        for i in self._top.candidates(shift):
            self._top.add(
                ExampleChange(
                    index=offset + int(kept[i]) // width,
                    shift=float(shift[i]),
                    label=int(flat[i]),
                    before=int(was[i]),
                    after=int(now[i]),
                    before_probability=float(p[i, was[i]]),
                    after_probability=float(q[i, now[i]]),
                )
            )

    def _log_probabilities(self, rows: Tensor) -> Tensor:
        if self._probabilities:
            if rows.shape[1] == 1:
                rows = torch.cat((1 - rows, rows), dim=1)
            rows = rows.clamp(min=1e-38).log()
        elif rows.shape[1] == 1:  # one logit of the positive class
            rows = torch.cat((torch.zeros_like(rows), rows), dim=1)
        return rows.log_softmax(dim=1)

    def _count_classes(self, labels: Tensor, right: Tensor, still: Tensor, classes: int) -> None:
        if self._per_class.shape[1] == 0:
            self._per_class = torch.zeros(3, classes, dtype=torch.int64)
        for row, values in zip(self._per_class, (torch.ones_like(labels), right.long(), still.long())):
            row.index_add_(0, labels, values)

    def result(self) -> ClassBehaviour:
        """Behaviour over the predictions added so far."""
        if self._count == 0:
            raise DataError("No label of the evaluation data is one of the model's classes.")
        lost, won, changed = self._flips.tolist()
        return ClassBehaviour(
            examples=self._count,
            right_to_wrong=lost,
            wrong_to_right=won,
            changed=changed,
            kl=self._kl / self._count,
            before=self._before.result(),
            after=self._after.result(),
            classes=self._classes(),
            most_changed=self._top.items(),
        )

    def _classes(self, most: int = 10) -> tuple[ClassChange, ...]:
        counts, right, still = self._per_class.double()
        moved = (still - right).abs() / counts.clamp(min=1).sqrt()
        order = [int(c) for c in moved.argsort(descending=True, stable=True)[:most] if moved[c] > 0]
        return tuple(
            ClassChange(
                label=c,
                examples=int(counts[c]),
                before=float(right[c] / counts[c]),
                after=float(still[c] / counts[c]),
            )
            for c in order
        )


def class_labels(outputs: Tensor, labels: Tensor) -> Tensor | None:
    """The labels as class indices where the outputs have one score for each class (or one for two classes), else None.

    Outputs are [n, classes], or with more axes [n, ..., classes] or [n, classes, ...] for labels [n, ...]; one score
    for two classes is [n] or [n, 1] with labels 0 and 1.
    """
    if outputs.numel() == labels.numel():
        binary = bool(((labels == 0) | (labels == 1)).all()) and labels.numel() == len(labels)
        return labels.long().flatten() if binary else None
    if labels.is_floating_point() or labels.dtype == torch.bool or outputs.ndim != labels.ndim + 1:
        return None
    fits = labels.shape in (outputs.shape[:-1], outputs.shape[:1] + outputs.shape[2:])
    return labels.long() if fits else None


def _class_rows(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs as [predictions, classes], in the order of the flattened labels."""
    if outputs.numel() == labels.numel():
        return outputs.reshape(-1, 1)
    if labels.shape != outputs.shape[:-1]:
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1])


def _are_probabilities(rows: Tensor) -> bool:
    """Whether these are probabilities rather than logits: none outside [0, 1], each row summing to one."""
    if bool((rows < 0).any()) or bool((rows > 1).any()):
        return False
    # A softmax in bfloat16 sums to one within about 1e-2; a row of logits does so by chance only.
    return rows.shape[1] == 1 or bool((rows.sum(dim=1) - 1).abs().max() < 1e-2)
