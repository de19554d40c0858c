"""Cross-layer equalization: what one layer gives much of and the next reads little of, shared out evenly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError


@dataclass(frozen=True)
class CrossLayer:
    """c_i = √(r1_i / r2_i), r the largest weight of channel i: W1[i] / c_i, b1_i / c_i, W2[:, i] · c_i.

    For pairs of layers with nothing but positively homogeneous functions between them (ReLU, pooling), so that the
    model computes the same; afterwards both weights have the same range in every channel. Pairs are gone through until
    no factor differs from 1 by more than `tolerance`, or `sweeps` times. Helps where scales are per tensor, and inputs
    whose channels differ by orders of magnitude, as in depthwise-separable nets. Kept only if the quantized model's
    outputs on held-out batches come nearer to the original's by it.
    Source: Nagel et al. 2019 (arXiv:1906.04721), eq. 11, without its absorption of large biases.
    """

    sweeps: int = 40
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.sweeps < 1 or not self.tolerance > 0:
            raise ConfigError("CrossLayer: sweeps is at least 1 and tolerance above 0.")

    def factors(self, first: Tensor, second: Tensor) -> Tensor:
        """c [n], float64, of n channels. first: [n, k], the weights that make each. second: [n, l], that read it.

        A channel that is never made or never read has no scale to share: its factor is 1.
        """
        made, read = first.abs().amax(1).double(), second.abs().amax(1).double()
        idle = (made <= 0) | (read <= 0)
        factors = (made.masked_fill(idle, 1) / read.masked_fill(idle, 1)).sqrt()
        return torch.where(idle, torch.ones_like(factors), factors)
