"""Roundings chosen by gradient: of the two grid points next to each weight one, for what a whole block gives."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.solvers.gptq import GPTQ
from gracile.solvers.rounding import Grid, Rounded, RoundingProblem, RoundingSolver, better_rows, nearest


class Choice(Protocol):
    """Between two grid points of every weight of a layer.

    variable: what is learned. step: from the one to the other; zero where there is no other.
    """

    variable: Tensor
    step: Tensor

    def weight(self) -> Tensor:
        """The weight that the layer computes with while it is learned."""
        ...

    def rounded(self) -> Tensor:
        """The grid points that are chosen."""
        ...


@dataclass(frozen=True)
class BlockSolver(RoundingSolver):
    """A rounding solver that learns on from another one's codes, on batches of a residual block's inputs.

    iterations: for each block. learning_rate: of what is learned; scales of activations learn at a tenth of it.
    batch_size: examples in an iteration. drop: probability that an activation of the original is left in place of its
    rounded one, and an input of the block in place of the present one. start: the solver to go on from; None: nearest.
    on_grid: whether weights are on the grid all the while, so that the best of all iterations can be kept.
    """

    on_grid: ClassVar[bool] = False
    iterations: int
    learning_rate: float
    batch_size: int
    drop: float
    start: GPTQ | None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.iterations < 1 or self.batch_size < 1:
            raise ConfigError(f"{name}: iterations and batch_size are at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"{name}: learning_rate is a positive number.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"{name}(drop={self.drop!r}): a probability in [0, 1).")
        if self.start is not None and not isinstance(self.start, GPTQ):
            raise ConfigError(f"{name}(start={self.start!r}): expected solvers.GPTQ() or None.")

    @property
    def damping(self) -> float:  # type: ignore[override]
        return (self.start or GPTQ()).damping

    @property
    def asymmetry(self) -> float:  # type: ignore[override]
        return (self.start or GPTQ()).asymmetry

    def draft(self) -> RoundingSolver:
        """That of the solver it goes on from."""
        return (self.start or GPTQ()).draft()

    @abstractmethod
    def choice(self, a: Tensor, b: Tensor, wanted: Tensor) -> Choice:
        """Between the grid points a, where it starts, and b, of weights that without a grid would be `wanted`."""

    @abstractmethod
    def optimizer(self, choices: Sequence[Choice], scales: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Of the variables of choices, and of the scales of activations."""

    def pull(self, choices: Sequence[Choice], progress: float) -> Tensor | float:
        """What is added to the loss at this share of the iterations."""
        return 0.0

    def update(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """One step on the gradients that are there."""
        optimizer.step()

    def __call__(self, prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
        """One layer alone, by its quadratic loss on all inputs at once."""
        found = nearest(prior, problem, grid) if self.start is None else self.start(prior, problem, grid)
        width = prior.shape[-1]
        scale, zero = (t.repeat_interleave(grid.group or width, dim=-1)[..., :width] for t in (found.scale, found.zero))
        here = found.weight / scale
        other = grid.second(problem.target, scale, zero, here)
        if problem.zeros is not None:
            other = torch.where(problem.zeros, here, other)
        choice = self.choice(found.weight, other * scale, problem.target)
        start = float(found.loss.sum().clamp_min(torch.finfo(found.loss.dtype).tiny))
        optimizer = self.optimizer([choice], [])
        best = found
        for i in range(self.iterations):
            progress = i / self.iterations
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = problem.loss(choice.weight())
                (loss.sum() / start + self.pull([choice], progress)).backward()  # type: ignore[no-untyped-call]
            if self.on_grid:
                best = better_rows(replace(found, weight=choice.rounded(), loss=loss.detach()), best)
            self.update(optimizer, progress)
        weight = choice.rounded()
        return better_rows(replace(found, weight=weight, loss=problem.loss(weight)), best)
