"""A codebook as the grid that a rounding solver works on, its levels learned by what errors in them count."""

from __future__ import annotations

import torch
from torch import Tensor

from gracile.formats import Codebook, PerTensor
from gracile.solvers import RoundingProblem
from gracile.solvers.codebook import best_levels
from gracile.steps.quantization.grids.base import FormatGrid
from gracile.steps.quantization.grids.levels import next_level, place_of

#: With more levels a weight stands so near to one that refitting them gains nothing for a product with M for each.
REFITTED_LEVELS = 32


class CodebookGrid(FormatGrid):
    """The levels of one weight; scales are 1."""

    def __init__(self, fmt: Codebook, levels: Tensor) -> None:
        super().__init__(PerTensor())
        self.fmt, self.levels = fmt, levels.detach().float().cpu()
        self.table = self.levels.double().unique()

    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(rows[:, 0]), torch.zeros_like(rows[:, 0])

    def units(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = self.table.to(weight)
        return table[place_of(weight, table)]

    def second(self, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor) -> Tensor:
        return next_level(weight, unit, self.table.to(weight))

    def stored_scale(self, encoded: dict[str, Tensor]) -> Tensor:
        return torch.ones((), device=encoded["levels"].device)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return self.fmt.encode(weight, self.levels.to(weight.device))

    def fitted(self, prior: Tensor, problem: RoundingProblem) -> CodebookGrid:
        """The levels that k-means finds for the weight, each error weighted by the metric's diagonal."""
        importance = problem.metric.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        return CodebookGrid(self.fmt, self.fmt.learn(prior, importance))

    def refitted(self, weight: Tensor, problem: RoundingProblem) -> tuple[CodebookGrid, Tensor] | None:
        """The levels that serve the codes of this weight best; None where there are too many to gain by it."""
        if len(self.levels) > REFITTED_LEVELS:
            return None
        codes = place_of(weight, self.table.to(weight))
        found = best_levels(codes, self.table, problem).float()
        unused = self.levels.new_zeros(len(self.levels) - len(found))  # where k-means found fewer levels
        return CodebookGrid(self.fmt, torch.cat([found, unused]).sort().values), found.to(weight)[codes]
