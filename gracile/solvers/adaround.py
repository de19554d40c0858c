"""AdaRound: of the two grid points next to each weight the one that serves the output best, found by gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.gptq import GPTQ
from gracile.solvers.rounding import Grid, Rounded, RoundingProblem, RoundingSolver, better_rows, nearest

#: Bounds that the sigmoid is stretched to before it is clipped to [0, 1], so that it reaches both.
LOW, HIGH = -0.1, 1.1

#: Share of the iterations before the choices are pulled to 0 and 1, and the exponents of that pull.
WARM_UP, FIRST_EXPONENT, LAST_EXPONENT = 0.2, 20.0, 2.0

#: A weight starts at least so far from the middle between its two grid points and from either.
START = (0.1, 0.45)


@dataclass(frozen=True)
class AdaRound(RoundingSolver):
    """min ‖f(x; a + h (b − a)) − y‖² / ‖f(x; a) − y‖² + pull · mean(1 − |2h − 1|^β), h = clip(σ(v) (ζ − γ) + γ, 0, 1)

    a is the grid point that `start` chose, b the next nearest to the weight on its other side; v is learned by Adam, β
    falls from 20 to 2, and in the end h is rounded to 0 or 1. Layers of a residual block are chosen together for what
    the block gives, on inputs that what lies before it, rounded already, gives now; the target is the original's block
    on its own. Sources: AdaRound (Nagel et al. 2020, arXiv:2004.10568), blocks as in BRECQ (Li et al. 2021,
    arXiv:2102.05426), with activations dropped as in QDrop (Wei et al. 2022, arXiv:2203.05740). Departures: it starts
    from a closed-form solution in place of the weights; both terms are shares, so that neither depends on the scale of
    a layer; and what is no better on its own objective, or on held-out batches, is taken back.

    iterations: of Adam, for each block. learning_rate: of v; scales of activations are learned at a tenth of it.
    batch_size: examples in an iteration. drop: probability that an activation of the original is left in place of its
    rounded one, and an input of the block in place of the present one. start: the solver to go on from; None: nearest.
    """

    iterations: int = 1000
    learning_rate: float = 1e-2
    batch_size: int = 32
    drop: float = 0.5
    pull: float = 10.0
    start: GPTQ | None = GPTQ()

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise ConfigError("AdaRound: iterations and batch_size are at least 1.")
        if not (0 < self.learning_rate < math.inf and 0 < self.pull < math.inf):
            raise ConfigError("AdaRound: learning_rate and pull are positive numbers.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"AdaRound(drop={self.drop!r}): a probability in [0, 1).")
        if self.start is not None and not isinstance(self.start, GPTQ):
            raise ConfigError(f"AdaRound(start={self.start!r}): expected solvers.GPTQ() or None.")

    @property
    def damping(self) -> float:  # type: ignore[override]
        return (self.start or GPTQ()).damping

    @property
    def asymmetry(self) -> float:  # type: ignore[override]
        return (self.start or GPTQ()).asymmetry

    def __call__(self, prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
        """One layer alone, by its quadratic loss on all inputs at once."""
        found = nearest(prior, problem, grid) if self.start is None else self.start(prior, problem, grid)
        width = prior.shape[-1]
        scale, zero = (t.repeat_interleave(grid.group or width, dim=-1)[..., :width] for t in (found.scale, found.zero))
        here = found.weight / scale
        other = grid.second(problem.target, scale, zero, here)
        if problem.zeros is not None:
            other = torch.where(problem.zeros, here, other)
        choice = Choice(found.weight, other * scale, problem.target)
        start = float(found.loss.sum().clamp_min(torch.finfo(found.loss.dtype).tiny))
        optimizer = torch.optim.Adam([choice.variable], self.learning_rate)
        with torch.enable_grad():
            for i in range(self.iterations):
                optimizer.zero_grad()
                loss = problem.loss(choice.weight()).sum() / start + self.pull * choice.undecided(i / self.iterations)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        weight = choice.rounded()
        return better_rows(Rounded(weight, found.scale, found.zero, problem.loss(weight), found.nearest_loss), found)


class Choice:
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
