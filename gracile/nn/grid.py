"""Rounding a weight to a grid that stays fixed, with gradients that pass straight through: training on the grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gracile.formats import Format, Int
from gracile.formats.granularity import from_rows, to_rows


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, fmt: Format, encoded: dict[str, Tensor]) -> Tensor:
        if not isinstance(fmt, Int):
            ctx.inside = None
            given = {name: tensor for name, tensor in encoded.items() if name not in ("codes", "shape")}
            return fmt.decode(fmt.encode(weight, **given)).to(weight.dtype)
        scale = encoded["scale"].reshape(-1, 1)
        zero_point = encoded.get("zero_point")
        q = torch.round(to_rows(fmt.granularity, weight.float()) / scale)
        if zero_point is not None:
            q += zero_point.reshape(-1, 1)
        inside = (q >= fmt.qmin).logical_and_(q <= fmt.qmax)
        ctx.inside = from_rows(fmt.granularity, inside, tuple(weight.shape))
        q.clamp_(fmt.qmin, fmt.qmax)
        if zero_point is not None:
            q -= zero_point.reshape(-1, 1)
        return from_rows(fmt.granularity, q.mul_(scale), tuple(weight.shape)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        return gradient if ctx.inside is None else gradient * ctx.inside, None, None


def on_grid(weight: Tensor, fmt: Format, encoded: dict[str, Tensor]) -> Tensor:
    """decode(encode(weight)) on the scales given, with dQ/dw = 1 inside the grid's range and 0 outside.

    The straight-through estimator of Bengio et al. (2013), with the clipped part cut off.
    encoded: tensors of the format that hold the grid ("scale", "zero_point"); their "codes" are not read.
    """
    result: Tensor = _OnGrid.apply(weight, fmt, encoded)  # type: ignore[no-untyped-call]
    return result


class TrainsOnGrid(nn.Module, ABC):
    """A layer that can hold its encoded weight as a float parameter for a while."""

    @abstractmethod
    def begin_training(self) -> None: ...

    @abstractmethod
    def end_training(self) -> None: ...


def begin_training(model: nn.Module) -> None:
    """Give every quantized layer of the model a float weight parameter that its forward rounds to the stored grid."""
    for module in model.modules():
        if isinstance(module, TrainsOnGrid):
            module.begin_training()


def end_training(model: nn.Module) -> None:
    """Encode what was trained, on the same grids, and drop the float parameters; outputs stay exactly as they were."""
    for module in model.modules():
        if isinstance(module, TrainsOnGrid):
            module.end_training()
