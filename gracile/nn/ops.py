"""The operators of quantized layers, registered with torch so that tracing and exporting keep each as one node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gracile.formats import Format, format_from_config


@torch.library.custom_op("gracile::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """scale · (clip(round(x / scale) + zero_point, qmin, qmax) − zero_point), rounding half to even.

    x: any shape and float dtype, computed in float32. scale: [] float32. zero_point: [] any integer dtype.
    The gradient passes straight through where x lies inside the range and is zero where it was clipped.
    """
    q = torch.div(x.float(), scale).round_().add_(zero_point).clamp_(qmin, qmax)
    return q.sub_(zero_point).mul_(scale).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def _save_range(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.qmin, ctx.qmax = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    q = torch.div(x.float(), scale).round_().add_(zero_point)
    inside = (q >= ctx.qmin).logical_and_(q <= ctx.qmax)
    return gradient * inside, None, None, None, None


quantize_dequantize.register_autograd(_straight_through, setup_context=_save_range)


@torch.library.custom_op("gracile::quantize_dequantize_per_token", mutates_args=())
def quantize_dequantize_per_token(x: Tensor, qmax: int) -> Tensor:
    """s · round(x / s), s = max|x| / qmax along the last axis, rounding half to even.

    x: any shape and float dtype, computed in float32. A token of zeros stays zeros. The gradient passes straight
    through.
    """
    y = x.float()
    scale = (y.abs().amax(-1, keepdim=True) / qmax).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.div(y, scale).round_().mul_(scale).to(x.dtype)


@quantize_dequantize_per_token.register_fake
def _(x: Tensor, qmax: int) -> Tensor:
    return torch.empty_like(x)


quantize_dequantize_per_token.register_autograd(lambda _ctx, gradient: (gradient, None))


@torch.library.custom_op("gracile::decode", mutates_args=())
def decode(tensors: Sequence[Tensor], names: str, format: str, shape: Sequence[int]) -> Tensor:
    """The float32 weight that a format's tensors stand for.

    tensors, names: what the format's `encode` gave without "shape", and their names joined by commas.
    format: the format's configuration as JSON. shape: of the weight.
    """
    encoded = dict(zip(names.split(","), tensors))
    encoded["shape"] = torch.tensor(shape, dtype=torch.int64)
    weight = format_from_json(format).decode(encoded)
    return weight.clone() if any(weight is tensor for tensor in tensors) else weight


@decode.register_fake
def _(tensors: Sequence[Tensor], names: str, format: str, shape: Sequence[int]) -> Tensor:
    return tensors[0].new_empty(shape, dtype=torch.float32)


@lru_cache(maxsize=256)
def format_from_json(config: str) -> Format:
    """The format whose configuration (see `format_to_config`) is this JSON text."""
    return format_from_config(json.loads(config))
