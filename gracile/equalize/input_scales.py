"""Scales moved from the input channels of linear layers into their weights, or back: SmoothQuant and AWQ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError

#: (weight [out, d], inputs [n, d]) -> both as the layer's formats will round them.
Rounded = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class InputScales(ABC):
    """W x = (W diag(s)) (diag(1/s) x): of the scales that each α makes those of least output error once rounded.

    1/s is a multiplication before the layer, so that a residual path that reads the same tensor is left alone. One
    choice for each set of layers that read the same tensor, on a sample of its inputs; none at all if that does not
    help on inputs that took no part in it.
    """

    alphas: tuple[float, ...]
    minimum_gain: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ConfigError(f"{name}(alphas={self.alphas!r}): expected one or more numbers from 0 to 1.")
        if not 1 <= self.minimum_gain < float("inf"):
            raise ConfigError(f"{name}(minimum_gain={self.minimum_gain!r}): expected a number of at least 1.")

    @abstractmethod
    def candidates(self, weight: Tensor, input_peak: Tensor, inputs: Tensor) -> list[Tensor]:
        """s [d], float32, for each α. weight: [out, d]. input_peak: [d], max|x_j|. inputs: [n, d]."""

    def __call__(self, weight: Tensor, input_peak: Tensor, inputs: Tensor, rounded: Rounded) -> Tensor | None:
        """s [d] of the best α, or None where it does not divide the squared error by `minimum_gain`.

        weight: [out, d], of all layers that read these inputs, one under the other. input_peak: [d] over all
        calibration data. inputs: [n, d], a sample; even rows choose, odd rows decide.
        """
        fitted, held_out = inputs[::2], inputs[1::2]
        candidates = self.candidates(weight, input_peak, fitted)
        errors = [_error(weight, fitted, scale, rounded) for scale in candidates]
        best = candidates[min(range(len(errors)), key=errors.__getitem__)]
        plain = _error(weight, held_out, torch.ones_like(best), rounded)
        scaled = _error(weight, held_out, best, rounded)
        return best if scaled * self.minimum_gain <= plain and scaled < plain else None


@dataclass(frozen=True)
class SmoothQuant(InputScales):
    """s_j = max|x_j|^α / max|w_j|^(1−α): outliers of input channels go into the weight, whose grids can take them.

    The scales are normalised to a geometric mean of 1, which changes nothing once both sides are on grids of their own.
    Source: Xiao et al. 2023 (arXiv:2211.10438), eq. 4. There α is one number chosen by hand (0.5) and 1/s goes into the
    layer norm before.

    alphas: to choose from, each between 0 and 1.
    minimum_gain: it has to divide the squared output error by at least this, for the multiplication has a price.
    """

    alphas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    minimum_gain: float = 1.2

    def scales(self, input_peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
        """s [d], float32. input_peak: [d], max|x_j|. weight: [out, d], of all layers that read these inputs."""
        peak = input_peak.double()
        columns = weight.abs().amax(0).double()
        # A channel that is always zero, or that no weight reads, has no scale to move.
        idle = (peak <= 0) | (columns <= 0)
        log = alpha * peak.masked_fill(idle, 1).log() - (1 - alpha) * columns.masked_fill(idle, 1).log()
        return _normalised(log, idle)

    def candidates(self, weight: Tensor, input_peak: Tensor, inputs: Tensor) -> list[Tensor]:
        return [self.scales(input_peak, weight, alpha) for alpha in self.alphas]


@dataclass(frozen=True)
class AWQ(InputScales):
    """s_j = (mean|x_j|)^α: weights that read large inputs are scaled up, so that their rounding weighs less.

    For schemes that leave inputs in floating point. Normalised as in `SmoothQuant`; α = 0 leaves the layer as it is.
    Source: Lin et al. 2023 (arXiv:2306.00978), eq. 4 and 5. There 1/s goes into what comes before the layer; its
    clipping of the weights is what `ranges` does here.

    alphas: to choose from, each between 0 and 1.
    minimum_gain: it has to divide the squared output error by at least this, for the multiplication has a price.
    """

    alphas: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))
    minimum_gain: float = 1.05

    def candidates(self, weight: Tensor, input_peak: Tensor, inputs: Tensor) -> list[Tensor]:
        mean = inputs.abs().double().mean(0)
        idle = mean <= 0
        return [_normalised(alpha * mean.masked_fill(idle, 1).log(), idle) for alpha in self.alphas]


def _normalised(log: Tensor, idle: Tensor) -> Tensor:
    """exp(log), float32, to a geometric mean of 1; channels that are idle stay as they are."""
    log = log.masked_fill(idle, 0)
    return (log - log.mean()).exp().masked_fill(idle, 1).float()


def _error(weight: Tensor, inputs: Tensor, scale: Tensor, rounded: Rounded) -> float:
    """‖Q(W s) Q(x / s) − W x‖² over the rows."""
    w, x = rounded(weight * scale, inputs / scale)
    return float((x @ w.T - inputs @ weight.T).double().square().sum())
