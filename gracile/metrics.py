"""Metrics: (outputs, batch) -> values of each example, higher is better, for `Data(metric=...)`.

A function's values [n] are averaged. An object also has `aggregate(values) -> float`, for metrics that are no mean over
examples; it is fast enough to be taken on thousands of resamples. Where a resample leaves it undefined it is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gracile.data import Batch, labels_of, logits_of
from gracile.errors import ConfigError, DataError, MissingExtraError
from gracile.losses.labelled import IGNORED, class_pairs, counted_loss, shifted, value_pairs

Values = npt.NDArray[np.float64]

__all__ = [
    "AUC",
    "F1",
    "R2",
    "AveragePrecision",
    "Pearson",
    "Perplexity",
    "Spearman",
    "TokenAccuracy",
    "accuracy",
    "auc",
    "average_precision",
    "f1",
    "mean_squared_error",
    "negative_cross_entropy",
    "pearson",
    "perplexity",
    "r2",
    "spearman",
    "token_accuracy",
]


def accuracy(outputs: Any, batch: Batch) -> Values:
    """1 where argmax(outputs) is the label, else 0: [n]. A single output is a logit, and decides by its sign.

    Of sequences, the share of labelled positions (label not −100) in each example.
    """
    predictions, labels = decisions(outputs, batch)
    right, counted = _per_example(predictions == labels, labels)
    with np.errstate(invalid="ignore"):  # an example without a label has no accuracy: NaN, refused where it is used
        return np.asarray(right / counted)


def negative_cross_entropy(outputs: Any, batch: Batch) -> Values:
    """log softmax(outputs)[label], the mean over labelled positions of each example: [n]."""
    logits, labels = class_pairs(outputs, batch)
    if labels.is_floating_point():
        raise DataError("negative_cross_entropy: labels are probabilities; class indices are needed.")
    examples = len(labels_of(batch))
    losses, counted = _per_example(counted_loss(logits, labels).reshape(examples, -1), labels.reshape(examples, -1))
    with np.errstate(invalid="ignore"):
        return np.asarray(-losses / counted)


def mean_squared_error(outputs: Any, batch: Batch) -> Values:
    """−mean((output − target)²) over the outputs of each example: [n]."""
    values, targets = value_pairs(outputs, batch)
    return _numpy(-(values - targets).square().reshape(len(values), -1).mean(dim=1))


@dataclass(frozen=True)
class TokenAccuracy:
    """Share of all labelled positions (label not −100) decided rightly; long sequences count for more."""

    name: ClassVar[str] = "token_accuracy"

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        """[n, 2]: right and labelled positions of each example."""
        predictions, labels = decisions(outputs, batch)
        return np.stack(_per_example(predictions == labels, labels), axis=1)

    def aggregate(self, values: Values) -> float:
        right, counted = values.sum(axis=0)
        return float(right / counted) if counted else float("nan")


@dataclass(frozen=True)
class F1:
    """F1 = 2 · precision · recall / (precision + recall) = 2 TP / (2 TP + FP + FN); 0 where nothing is positive.

    average: "binary" of class 1; "macro" the mean over classes that occur; "weighted" the same by their number of
        labels; "micro" over all decisions. As in scikit-learn.
    """

    average: Literal["binary", "macro", "micro", "weighted"] = "macro"
    name: ClassVar[str] = "f1"

    def __post_init__(self) -> None:
        if self.average not in ("binary", "macro", "micro", "weighted"):
            raise ConfigError(f"F1(average={self.average!r}): use 'binary', 'macro', 'micro' or 'weighted'.")

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        """[n, 2]: predicted class and label."""
        predictions, labels = decisions(outputs, batch)
        if labels.ndim != 1:
            raise DataError(f"f1: one label per example is needed, and labels have shape {tuple(labels.shape)}.")
        return np.stack([_numpy(predictions), _numpy(labels)], axis=1)

    def aggregate(self, values: Values) -> float:
        predictions, labels = values.astype(np.int64).T
        classes = int(max(predictions.max(), labels.max(), 1)) + 1
        hits = np.bincount(labels[predictions == labels], minlength=classes)
        predicted = np.bincount(predictions, minlength=classes)
        actual = np.bincount(labels, minlength=classes)
        if self.average == "micro":
            return float(2 * hits.sum() / (predicted.sum() + actual.sum()))
        scores = 2 * hits / np.maximum(predicted + actual, 1)
        if self.average == "binary":
            return float(scores[1])
        if self.average == "weighted":
            return float((scores * actual).sum() / actual.sum())
        return float(scores[(predicted + actual) > 0].mean())


@dataclass(frozen=True)
class _Pairs:
    """Values [n, 2]: score (one output) and target of each example."""

    name: ClassVar[str]

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        values, targets = value_pairs(outputs, batch)
        if values[0].numel() != 1:
            raise DataError(f"{self.name}: one output per example is needed, not the shape {tuple(values.shape)}.")
        return np.stack([_numpy(values.reshape(-1)), _numpy(targets.reshape(-1))], axis=1)


@dataclass(frozen=True)
class Pearson(_Pairs):
    """Pearson's correlation of scores with targets; undefined (NaN) where either is constant."""

    name: ClassVar[str] = "pearson"

    def aggregate(self, values: Values) -> float:
        return _correlation(values[:, 0], values[:, 1])


@dataclass(frozen=True)
class Spearman(_Pairs):
    """Spearman's rank correlation of scores with targets, ties sharing their mean rank."""

    name: ClassVar[str] = "spearman"

    def aggregate(self, values: Values) -> float:
        return _correlation(_ranks(values[:, 0]), _ranks(values[:, 1]))


@dataclass(frozen=True)
class R2:
    """R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)², the mean over outputs; undefined (NaN) where a target is constant."""

    name: ClassVar[str] = "r2"

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        """[n, 2k]: k outputs, then k targets."""
        values, targets = value_pairs(outputs, batch)
        return np.concatenate([_numpy(t.reshape(len(t), -1)) for t in (values, targets)], axis=1)

    def aggregate(self, values: Values) -> float:
        outputs, targets = np.split(values, 2, axis=1)
        residual = ((targets - outputs) ** 2).sum(axis=0)
        total = ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.where(total > 0, 1 - residual / total, np.nan).mean())


@dataclass(frozen=True)
class _Ranking:
    """Values [n, 2]: a score that rises with the probability of class 1, and the label 0 or 1."""

    name: ClassVar[str]

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        logits, labels = logits_of(outputs).float(), labels_of(batch)
        if logits.ndim == 2 and logits.shape[1] == 2:
            logits = logits[:, 1] - logits[:, 0]
        scores, targets = value_pairs(logits, {"labels": labels})
        if scores.numel() != len(scores) or not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError(
                f"{self.name}: needs labels 0 and 1, and one logit or two per example; outputs have shape "
                f"{tuple(logits_of(outputs).shape)}."
            )
        return np.stack([_numpy(scores.reshape(-1)), _numpy(targets.reshape(-1))], axis=1)


@dataclass(frozen=True)
class AUC(_Ranking):
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive scores higher."""

    name: ClassVar[str] = "auc"

    def aggregate(self, values: Values) -> float:
        positive = values[:, 1] == 1
        n = int(positive.sum())
        if n in (0, len(values)):
            return float("nan")
        above = _ranks(values[:, 0])[positive].sum() - n * (n + 1) / 2  # Mann and Whitney's U
        return float(above / (n * (len(values) - n)))


@dataclass(frozen=True)
class AveragePrecision(_Ranking):
    """Σ (recall_k − recall_{k−1}) · precision_k, scikit-learn's `average_precision_score`."""

    name: ClassVar[str] = "average_precision"

    def aggregate(self, values: Values) -> float:
        try:
            from sklearn.metrics import average_precision_score
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "metrics", "The metric average_precision") from error
        return float(average_precision_score(values[:, 1], values[:, 0])) if values[:, 1].any() else float("nan")


@dataclass(frozen=True)
class Perplexity:
    """−exp(Σ −log p(token) / tokens): negative, so that higher is better; `display` gives the usual positive number.

    shift: the logits of position t are judged by the label of position t + shift. 1 is a causal language model whose
        labels are its input; 0 a model whose labels are already aligned.
    """

    shift: int = 1
    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError(f"Perplexity(shift={self.shift}): 0 or more.")

    def __call__(self, outputs: Any, batch: Batch) -> Values:
        """[n, 2]: summed −log p of the labelled tokens (label not −100), and their number."""
        moved, labels = shifted(logits_of(outputs), labels_of(batch), self.shift)
        logits, flat = class_pairs(moved, {"labels": labels})
        losses = counted_loss(logits, flat).reshape(len(labels), -1)
        return np.stack(_per_example(losses, flat.reshape(len(labels), -1)), axis=1)

    def aggregate(self, values: Values) -> float:
        losses, tokens = values.sum(axis=0)
        with np.errstate(over="ignore"):
            return float(-np.exp(losses / tokens)) if tokens else float("nan")

    def display(self, value: float) -> float:
        """The perplexity that an aggregate stands for."""
        return -value


def decisions(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels, [n] or [n, positions], on the outputs' device; DataError where they do not fit."""
    logits, labels = logits_of(outputs), labels_of(batch).to(logits_of(outputs).device)
    single = labels.shape == logits.shape or (*labels.shape, 1) == logits.shape
    if single and logits.numel() == len(logits):
        return (logits.reshape(-1) > 0).long(), labels.reshape(-1).long()
    rows, flat = class_pairs(outputs, batch)
    if flat.is_floating_point():
        flat = flat.argmax(dim=-1)
    shape = (len(logits),) if len(flat) == len(logits) else (len(logits), -1)
    return rows.argmax(dim=-1).reshape(shape), flat.reshape(shape)


def _per_example(values: Tensor, labels: Tensor) -> tuple[Values, Values]:
    """Sum of values, and number of them, over the labelled positions of each example: [n] and [n]."""
    counted = (labels != IGNORED).reshape(len(labels), -1)
    return _numpy((values.reshape(counted.shape) * counted).double().sum(dim=1)), _numpy(counted.sum(dim=1))


def _correlation(x: Values, y: Values) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _ranks(values: Values) -> Values:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=np.float64)


def _numpy(tensor: Tensor) -> Values:
    return np.asarray(tensor.detach().double().cpu().numpy())


token_accuracy = TokenAccuracy()
f1 = F1()
pearson = Pearson()
spearman = Spearman()
r2 = R2()
auc = AUC()
average_precision = AveragePrecision()
perplexity = Perplexity()
