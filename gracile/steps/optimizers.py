"""Optimizers as settings: which one trains a model, and with what rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gracile.errors import ConfigError
from gracile.nn import QuantizedLayer


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with Nesterov momentum; the usual choice for convolutional nets."""

    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check(self.learning_rate)

    def build(self, groups: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer of parameters, or of groups of them, each with the settings in which it differs."""
        return torch.optim.SGD(
            groups,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; the usual choice for everything else."""

    learning_rate: float = 5e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check(self.learning_rate)

    def build(self, groups: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer of parameters, or of groups of them, each with the settings in which it differs."""
        return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)


def default_optimizer(model: nn.Module) -> SGD | AdamW:
    """AdamW(1e-3) without decay for weights of fewer than 8 bits, SGD for nets with two-dimensional batch norms, else
    AdamW.

    Few bits: weights move between codes, and scales by shares of themselves, at a pace that only Adam finds for both.
    """
    if any(isinstance(m, QuantizedLayer) and m.weight_format.bits < 8 for m in model.modules()):
        return AdamW(1e-3, weight_decay=0.0)
    return SGD() if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else AdamW()


def _check(learning_rate: float) -> None:
    if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < float("inf")):
        raise ConfigError(f"learning_rate={learning_rate!r}: expected a positive number.")
