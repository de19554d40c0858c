"""AdaRound: of the two grid points next to each weight the one that serves the output best, found by gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.block_rounding import BlockSolver, Choice
from gracile.solvers.gptq import GPTQ

#: Bounds that the sigmoid is stretched to before it is clipped to [0, 1], so that it reaches both.
LOW, HIGH = -0.1, 1.1

#: Share of the iterations before the choices are pulled to 0 and 1, and the exponents of that pull.
WARM_UP, FIRST_EXPONENT, LAST_EXPONENT = 0.2, 20.0, 2.0

#: A weight starts at least so far from the middle between its two grid points and from either.
START = (0.1, 0.45)


@dataclass(frozen=True)
class AdaRound(BlockSolver):
    """min ‖f(x; a + h (b − a)) − y‖² / ‖f(x; a) − y‖² + strength · mean(1 − |2h − 1|^β), h = clip(σ(v) (ζ − γ) + γ)

    h is clipped to [0, 1]. a is the grid point that `start` chose, b the next nearest to the weight on its other side;
    v is learned by Adam, β falls from 20 to 2, and in the end h is rounded to 0 or 1. Layers of a residual block are
    chosen together for what the block gives, on inputs that what lies before it, rounded already, gives now; the target
    is the original's block on its own. Sources: AdaRound (Nagel et al. 2020, arXiv:2004.10568), blocks as in BRECQ (Li
    et al. 2021, arXiv:2102.05426), with activations dropped as in QDrop (Wei et al. 2022, arXiv:2203.05740).
    Departures: it starts from a closed-form solution in place of the weights; both terms are shares, so that neither
    depends on the scale of a layer; and what is no better on its own objective, or on held-out batches, is taken back.

    iterations, learning_rate, batch_size, drop, start: as in `BlockSolver`. strength: of the pull to either point.
    """

    iterations: int = 1000
    learning_rate: float = 1e-2
    batch_size: int = 32
    drop: float = 0.5
    strength: float = 10.0
    start: GPTQ | None = GPTQ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength < math.inf:
            raise ConfigError("AdaRound: strength is a positive number.")

    def choice(self, a: Tensor, b: Tensor, wanted: Tensor) -> Choice:
        return SoftChoice(a, b, wanted)

    def optimizer(self, choices: Sequence[Choice], scales: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Adam for both."""
        groups = [{"params": [choice.variable for choice in choices], "lr": self.learning_rate}]
        return torch.optim.Adam([*groups, *([{"params": scales, "lr": self.learning_rate / 10}] if scales else [])])

    def pull(self, choices: Sequence[Choice], progress: float) -> Tensor:
        """The mean over the weights that have a choice, and none at first."""
        counts = [choice.step.count_nonzero() for choice in choices]
        parts = [c.undecided(progress) * n for c, n in zip(choices, counts, strict=True) if isinstance(c, SoftChoice)]
        return self.strength * torch.stack(parts).sum() / sum(counts)


class SoftChoice:
    """a + h (b − a) for the two grid points a and b of every weight, all of one shape.

    wanted: the weight without a grid, by which h starts: nearer to a than to b.
    """

    def __init__(self, a: Tensor, b: Tensor, wanted: Tensor) -> None:
        self.a, self.step = a, b - a
        share = ((wanted - a) / torch.where(self.step == 0, torch.ones_like(a), self.step)).clamp(*START)
        self.variable = torch.logit((share - LOW) / (HIGH - LOW)).requires_grad_()

    def share(self) -> Tensor:
        """h, in [0, 1]."""
        return (torch.sigmoid(self.variable) * (HIGH - LOW) + LOW).clamp(0, 1)

    def weight(self) -> Tensor:
        """The weight between its grid points."""
        return self.a + self.share() * self.step

    def rounded(self) -> Tensor:
        """The grid point that is nearer."""
        return (self.a + (self.share() > 0.5) * self.step).detach()

    def undecided(self, progress: float) -> Tensor:
        """mean(1 − |2h − 1|^β) at this share of the iterations, 0 during the warm-up."""
        if progress < WARM_UP:
            return self.variable.new_zeros(())
        exponent = FIRST_EXPONENT + (LAST_EXPONENT - FIRST_EXPONENT) * (progress - WARM_UP) / (1 - WARM_UP)
        return (1 - (2 * self.share() - 1).abs().pow(exponent)).mean()
