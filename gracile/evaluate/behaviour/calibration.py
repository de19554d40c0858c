"""Calibration: whether predicted probabilities are as often right as they say, in bins filled batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How good a classifier's probabilities are; lower is better for all three.

    ece: Σ_b (n_b / n) · |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017; as torchmetrics).
    brier: mean of Σ_k (p_k - [k is the label])² (Brier 1950: between 0 and 2).
    nll: mean of -log p(label), in nats.
    bins: (examples, mean confidence, accuracy) of each bin, from the least confident up.
    """

    ece: float
    brier: float
    nll: float
    bins: tuple[tuple[int, float, float], ...]


class CalibrationMeter:
    """Sums over batches from which `result` computes the Calibration of all of them."""

    def __init__(self, bins: int = BINS) -> None:
        self._sums = torch.zeros(3, bins, dtype=torch.float64)  # examples, confidence, right
        self._brier = 0.0
        self._nll = 0.0

    def update(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add examples: float64 log-probabilities [n, classes] and their labels [n]."""
        probabilities = log_probabilities.exp()
        confidence, predicted = probabilities.max(dim=1)
        bins = self._sums.shape[1]
        # A confidence of exactly 1 belongs to the last bin, not to one of its own.
        index = (confidence * bins).long().clamp(0, bins - 1)
        for row, values in zip(self._sums, (torch.ones_like(confidence), confidence, (predicted == labels).double())):
            row.index_add_(0, index, values)
        of_label = log_probabilities.gather(1, labels[:, None])[:, 0]
        self._nll -= float(of_label.sum())
        self._brier += float((probabilities.square().sum(dim=1) - 2 * of_label.exp() + 1).sum())

    def result(self) -> Calibration:
        """Calibration of the examples added so far, of which there must be one at least."""
        count, confidence, right = self._sums
        n = float(count.sum())
        held = count.clamp(min=1)
        rows = zip(count.tolist(), (confidence / held).tolist(), (right / held).tolist())
        return Calibration(
            ece=float((confidence - right).abs().sum() / n),
            brier=self._brier / n,
            nll=self._nll / n,
            bins=tuple((int(c), conf, acc) for c, conf, acc in rows),
        )
