"""What a format's grid is to the steps: a solver's grid that knows how a weight on it is stored."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from gracile.formats import Granularity, PerGroup, PerTensor
from gracile.formats.granularity import scale_shape
from gracile.solvers import Grid, RoundingProblem


class FormatGrid(Grid):
    """Which weights share a scale, by a format's granularity, and how a weight on the grid is stored."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self.group = granularity.size if isinstance(granularity, PerGroup) else None
        self.shared = isinstance(granularity, PerTensor)

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        shape = weight.shape[:-1]
        one = (1, -1) if self.shared else (-1, weight.shape[-1])
        counts = importance.unsqueeze(-2).expand_as(weight).reshape(one)
        # In float32, which is what is stored: a solver then rounds to the very grid that the layer will have.
        scale, zero = (t.float().to(weight) for t in self.fit_rows(weight.reshape(one), counts))
        return scale.expand(shape.numel()).reshape(shape), zero.expand(shape.numel()).reshape(shape)

    @abstractmethod
    def fit_rows(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point [k] of rows [k, n] that have one each."""

    @abstractmethod
    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight on the grid, float32 in its layer's shape; scale, zero: as `scale_shape` has it."""

    def stored_scale(self, encoded: dict[str, Tensor]) -> Tensor:
        """The scales of a weight that is encoded, of any shape in the order of `to_rows`."""
        return encoded["scale"]

    def fitted(self, prior: Tensor, problem: RoundingProblem) -> FormatGrid:
        """The grid for one weight, where it has more than scales to find; by default the same."""
        return self

    def refitted(self, weight: Tensor, problem: RoundingProblem) -> tuple[FormatGrid, Tensor] | None:
        """A grid that serves this weight's codes better, and what they are on it; None where it has scales only."""
        return None

    def encode_rows(self, weight: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """`encode` of a weight [..., out, d] and scales [..., out, groups], for a layer's weight of this shape."""
        of = scale_shape(self.granularity, shape)
        scale, zero = (t.flatten()[: math.prod(of)].reshape(of).float() for t in (scale, zero))
        return self.encode(weight.reshape(shape).float(), scale, zero)
