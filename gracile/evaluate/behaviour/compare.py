"""Runs two models over the same batches and measures how their behaviour differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gracile.data import Batch, labels_of, logits_of
from gracile.errors import DataError
from gracile.evaluate.behaviour.classes import ClassBehaviour, ClassMeter, class_labels
from gracile.evaluate.behaviour.outputs import OutputBehaviour, OutputMeter

Predict = Callable[[Batch], Any]


def behaviour(
    before: Predict, after: Predict, batches: Iterable[Batch], *, examples: int = 10
) -> ClassBehaviour | OutputBehaviour:
    """How the outputs of two models differ over the batches; `examples` of those that changed most are kept.

    before, after: batch -> outputs, for a model or one exported to a runtime. Outputs with a class axis and integer
    labels are compared as classes, one output with 0/1 labels as two classes, all others as vectors. Only sums are
    kept between batches. Raises DataError for no data, and where the two outputs differ in shape.
    """
    classes = ClassMeter(examples)
    outputs = OutputMeter(examples)
    as_classes = True
    offset = 0
    for batch, first, second in _paired(before, after, batches):
        labels = _labels(first, batch) if as_classes else None
        if labels is not None:
            classes.update(first, second, labels, offset)
        elif as_classes and offset:
            # Earlier batches looked like classes by chance (counts that were all 0 or 1): begin again as vectors.
            return _as_outputs(before, after, batches, examples)
        else:
            as_classes = False
            outputs.update(first, second, offset)
        offset += len(first)
    return classes.result() if as_classes else outputs.result()


def _as_outputs(before: Predict, after: Predict, batches: Iterable[Batch], examples: int) -> OutputBehaviour:
    meter = OutputMeter(examples)
    offset = 0
    for _, first, second in _paired(before, after, batches):
        meter.update(first, second, offset)
        offset += len(first)
    return meter.result()


def _paired(before: Predict, after: Predict, batches: Iterable[Batch]) -> Iterable[tuple[Batch, Tensor, Tensor]]:
    empty = True
    for batch in batches:
        with torch.no_grad():
            first, second = (logits_of(predict(batch)).detach().cpu().double() for predict in (before, after))
        if first.shape != second.shape:
            raise DataError(
                f"The two models give outputs of shapes {tuple(first.shape)} and {tuple(second.shape)}.\n"
                f"  They can only be compared on the same task, with the same classes."
            )
        empty = False
        yield batch, first, second
    if empty:
        raise DataError("The evaluation data hold no batches, so behaviour cannot be compared.")


def _labels(outputs: Tensor, batch: Batch) -> Tensor | None:
    try:
        return class_labels(outputs, labels_of(batch).detach().cpu())
    except DataError:  # a batch without labels
        return None
