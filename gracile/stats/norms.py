"""Normalisations with a factor for each channel, seen as layers that are linear in these factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

#: Of the largest value: how far an output may lie from the one that is affine in the factors, which float32 rounds.
TOLERANCE = 1e-3


def has_factors(module: nn.Module) -> bool:
    """Whether a vector `weight`, and perhaps a `bias` of its shape, is all that the module has, as layer norms do.

    Not batch norms, whose stored mean and variance are corrected by themselves.
    """
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.ndim != 1 or any(True for _ in module.buffers()):
        return False
    return all(name == "bias" and p.shape == weight.shape for name, p in parameters.items())


@torch.no_grad()
def normalised(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(n, o) with module(x) = o + weight · n along the last axis, the bias left out; None where it is no such module.

    x: what the module is given. n, o: of the shape of its output; o is zero where the factors count from zero. That the
    output is affine in each factor and has the channels last is seen by three forwards with other factors.
    """
    parameters: dict[str, Any] = dict(module.named_parameters())
    weight = parameters["weight"]
    zero = torch.zeros_like(weight)

    def run(factors: Tensor) -> Any:
        given = {"weight": factors} | ({"bias": zero} if "bias" in parameters else {})
        return functional_call(module, given, (x,))

    offset, at_one = run(zero), run(torch.ones_like(weight))
    if not isinstance(offset, Tensor) or offset.shape[-1:] != weight.shape:
        return None
    n, ramp = at_one - offset, torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)
    found, expected = run(ramp), offset + ramp * n
    if float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        return None
    return n, offset
