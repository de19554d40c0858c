"""Activation: units by how large they are on calibration data (Minitron)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.criteria.base import CannotScoreError, Units
from gracile.errors import ConfigError


@dataclass(frozen=True)
class Activation:
    """score[u] = (mean |x|^power)^(1/power) over examples, positions and the inputs x that unit u feeds.

    power: 1 takes the mean of absolute values, 2 the root of the mean square.

    Measured at the inputs of the layers that read the units (behind the nonlinearity; of a head, in front of the output
    projection), and averaged over those layers. Raises CannotScoreError where anything but linear and ungrouped
    convolution layers reads them.
    Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, with one mean over batch and sequence
    alike, where they may take another norm over each.
    """

    power: int = 1

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ConfigError(f"Activation(power={self.power!r}): 1 for absolute values, 2 for squares.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"input_abs_mean" if self.power == 1 else "input_sq_mean"})

    @property
    def comparable(self) -> bool:
        return False

    def unit_scores(self, units: Units) -> Tensor:
        if not units.inputs:
            raise CannotScoreError("Activation: not all that reads it are linear or ungrouped convolution layers")
        mean = torch.stack([values.double().mean(1) for values in units.inputs]).mean(0)
        return mean if self.power == 1 else mean.sqrt()
