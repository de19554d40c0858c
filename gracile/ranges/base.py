"""What a range method is: from the values a tensor takes to the scale and zero point that represent them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gracile.formats import Int
from gracile.formats.granularity import to_rows
from gracile.layer_stats import Histogram


class Range(ABC):
    """Chooses the range that a format covers. Members are frozen dataclasses.

    activation(histogram, fmt) -> (scale [] float32, zero_point [] int16) of a per-tensor format; the zero point is 0
        if the format is symmetric, and qmin where no value is negative.
    rows(rows, fmt, importance) -> (scale [k] float32, zero_point [k] int16) of weights [k, n], a scale for each row.
        importance: [n] or [k, n], what an error in each counts, where the method looks at errors; None: all the same.
        Asymmetric formats keep the zero point of the full range: both ends are clipped by the same factor.
    """

    @abstractmethod
    def activation(self, histogram: Histogram, fmt: Int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def rows(self, rows: Tensor, fmt: Int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def weight(self, weight: Tensor, fmt: Int) -> Tensor:
        """The scales of a weight, float32, `fmt.scale_shape(weight.shape)`; `fmt.encode` finds the zero points."""
        rows = to_rows(fmt.granularity, weight.detach().float())
        return self.rows(rows, fmt)[0].reshape(fmt.scale_shape(weight.shape))


def scale_and_zero(fmt: Int, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """`fmt.scale_of` for ranges given as numbers or tensors, with a zero point of 0 for symmetric formats."""
    return _with_zero(*fmt.scale_of(torch.as_tensor(low), torch.as_tensor(high)))


def full_range(rows: Tensor, fmt: Int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [k] that hold every weight of the rows [k, n]."""
    return _with_zero(*fmt.weight_scale_of(rows.amin(dim=1), rows.amax(dim=1)))


def _with_zero(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    return scale, torch.zeros_like(scale, dtype=torch.int16) if zero_point is None else zero_point
