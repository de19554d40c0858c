"""SignRound: roundings learned by the sign of the gradient, always computing with weights on the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.solvers.block_rounding import BlockSolver, Choice
from gracile.solvers.gptq import GPTQ


@dataclass(frozen=True)
class SignRound(BlockSolver):
    """min ‖f(x; a + [h > ½] (b − a)) − y‖²,  h ← clip(h − rate · sign(∂/∂h), 0, 1), ∂[h > ½]/∂h = 1.

    a is the grid point that `start` chose, b the next nearest to the weight on its other side; h starts at the weight's
    place between them. The rate falls linearly to 0. Unlike AdaRound's, no weight is ever between grid points, so that
    nothing has to be pulled to one and far fewer iterations do. Blocks, inputs and targets are the same.
    Source: SignRound, Cheng et al. 2023, arXiv:2309.05516 (AutoRound). Departures: the rounding of each weight is
    relative to the grid point that `start` chose, scales of weights stay as it left them, and what is no better on its
    own objective, or on held-out batches, is taken back.

    iterations, batch_size, drop, start: as in `BlockSolver`. learning_rate: of h, whose whole range is 1.
    """

    on_grid: ClassVar[bool] = True
    iterations: int = 200
    learning_rate: float = 0.005
    batch_size: int = 32
    drop: float = 0.0
    start: GPTQ | None = GPTQ()

    def choice(self, a: Tensor, b: Tensor, wanted: Tensor) -> Choice:
        return HardChoice(a, b, wanted)

    def optimizer(self, choices: Sequence[Choice], scales: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Plain gradient descent, which `update` gives the signs; θ of scales s exp(θ) moves at a tenth of the rate."""
        groups = [[choice.variable for choice in choices], *([list(scales)] if scales else [])]
        return torch.optim.SGD([{"params": group} for group in groups], lr=self.learning_rate)

    def update(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """A step of the rate's length against the sign of every gradient, and h back into [0, 1]."""
        for place, group in enumerate(optimizer.param_groups):
            group["lr"] = self.learning_rate * (1 - progress) / (10 if place else 1)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            for variable in optimizer.param_groups[0]["params"]:
                variable.clamp_(0, 1)


class HardChoice:
    """a or b, whichever h is nearer to: a up to a half, with a gradient as if the weight were a + h (b − a).

    wanted: the weight without a grid, by which h starts; at a where the weight is nearer to b all the same.
    """

    def __init__(self, a: Tensor, b: Tensor, wanted: Tensor) -> None:
        self.a, self.step = a, b - a
        share = (wanted - a) / torch.where(self.step == 0, torch.ones_like(a), self.step)
        self.variable = share.clamp(0, 0.5).requires_grad_()

    def weight(self) -> Tensor:
        """The grid point, through which gradients pass."""
        hard = (self.variable.detach() > 0.5).to(self.a.dtype)
        return self.a + (self.variable + (hard - self.variable.detach())) * self.step

    def rounded(self) -> Tensor:
        """The grid point."""
        return (self.a + (self.variable.detach() > 0.5) * self.step).detach()
