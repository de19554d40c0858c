"""Residual perceptrons whose blocks matter as much as a test says, for steps that take blocks out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """x + scale · f(x), f of one hidden layer; normalised: behind the sum (post-norm)."""

    def __init__(self, dim: int, hidden: int, scale: float = 1.0, normalised: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim) if normalised else nn.Identity()
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return y


class ResidualMLP(nn.Module):
    """A perceptron for each scale on one stream, to three classes; the same weights each time."""

    def __init__(
        self,
        inputs: int = 5,
        dim: int = 8,
        hidden: int = 16,
        scales: Sequence[float] = (3, 0.1, 2, 0.5, 1),
        *,
        normalised: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(inputs, dim), nn.Linear(dim, 3)
        self.blocks = nn.ModuleList(Perceptron(dim, hidden, scale, normalised) for scale in scales)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y
