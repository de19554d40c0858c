"""Losses to the true labels, (outputs, batch) -> scalar, for `Data(loss=...)`, and how outputs pair with labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from gracile.data import Batch, labels_of, logits_of
from gracile.errors import DataError

#: Label of positions that do not count, as in PyTorch and Hugging Face.
IGNORED = -100


def cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """−log softmax(logits)[label], mean over labelled examples and positions, in float32.

    outputs: logits [batch, ..., classes], or [batch, classes, ...] where only that fits the labels. labels: class
    indices [batch, ...], −100 where a position does not count, or class probabilities of the logits' shape. A batch
    without a counted position gives 0.
    """
    logits, labels = class_pairs(outputs, batch)
    if labels.is_floating_point():
        return functional.cross_entropy(logits, labels)
    counted = (labels != IGNORED).sum().clamp(min=1)
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / counted


def next_token_cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """Cross entropy of a causal language model: the logits of position t against the label of position t + 1.

    outputs: logits [batch, tokens, classes]. labels: [batch, tokens], the tokens themselves, −100 where none counts.
    """
    logits, labels = shifted(logits_of(outputs), labels_of(batch), 1)
    return cross_entropy(logits, {"labels": labels})


def mean_squared_error(outputs: Any, batch: Batch) -> Tensor:
    """mean((output − target)²) over all elements, in float32. A last dimension of 1 may be absent on either side."""
    return functional.mse_loss(*value_pairs(outputs, batch))


def binary_cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """−[y · log σ(z) + (1 − y) · log(1 − σ(z))], mean over all elements, in float32.

    outputs: logits z. labels: y in [0, 1] of the same shape; a last dimension of 1 may be absent on either side.
    """
    logits, labels = value_pairs(outputs, batch)
    if bool(((labels < 0) | (labels > 1)).any()):
        raise DataError(
            f"binary_cross_entropy: labels run from {labels.min().item():g} to {labels.max().item():g}, beyond "
            f"[0, 1].\n"
            f"  Use cross_entropy for class indices."
        )
    return functional.binary_cross_entropy_with_logits(logits, labels)


def class_pairs(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] float32 and labels [n] int64 (or [n, classes] float32 probabilities), positions flattened.

    Raises DataError where shapes do not fit or a label is no class.
    """
    logits = logits_of(outputs).float()
    labels = labels_of(batch).to(logits.device)
    if labels.is_floating_point() and labels.shape == logits.shape and logits.ndim > 1:
        return logits.flatten(0, -2), labels.float().flatten(0, -2)
    if labels.ndim == logits.ndim and labels.shape[-1:] == (1,):
        labels = labels.squeeze(-1)
    if logits.ndim > 2 and logits.shape[:-1] != labels.shape == logits.shape[:1] + logits.shape[2:]:
        logits = logits.movedim(1, -1)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} ({labels.dtype}) do not fit outputs of shape "
            f"{tuple(logits.shape)}.\n"
            f"  Expected class indices [batch, ...] for logits [batch, ..., classes]."
        )
    logits, labels = logits.flatten(0, -2), labels.flatten().long()
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(wrong.any()):
        raise DataError(
            f"Label {labels[wrong][0].item()} is no class: the outputs have {logits.shape[-1]} (0 to "
            f"{logits.shape[-1] - 1}), and {IGNORED} marks what does not count."
        )
    return logits, labels


def value_pairs(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs and labels float32 of one shape; never broadcast, since [n] against [n, 1] would compare all with all."""
    values = logits_of(outputs).float()
    labels = labels_of(batch).to(values.device).float()
    if labels.shape != values.shape:
        if (*labels.shape, 1) == values.shape or labels.shape == (*values.shape, 1):
            return values, labels.reshape(values.shape)
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(values.shape)}.\n"
            f"  The two must be equal; a last dimension of 1 may be absent."
        )
    return values, labels


def shifted(logits: Tensor, labels: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Logits [batch, tokens − shift, classes] of positions t beside labels [batch, tokens − shift] of t + shift."""
    if shift == 0:
        return logits, labels
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(logits.shape)}.\n"
            f"  Expected tokens [batch, tokens] for logits [batch, tokens, classes]."
        )
    return logits[:, :-shift], labels[:, shift:]


def counted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each of [n] pairs, 0 where the label is −100; float32."""
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
