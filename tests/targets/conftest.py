"""A min-max quantizer for tests, apart from the step's: target tests stand on layers and formats only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.environment import has_int8_dot_product
from gracile.formats import Format, Int, PerTensor, format_to_config
from gracile.nn import quantize_layer, quantized_kind

UINT8 = Int(8, PerTensor(), symmetric=False)


def quantize(
    model: nn.Module,
    example: Tensor,
    weight: Format,
    activation: Int | None = UINT8,
    outputs: Sequence[str] = (),
) -> nn.Module:
    """A copy with every layer that has a quantized kind replaced; ranges are the extremes on the example.

    outputs: layers whose output is quantized as well. Weights of 8 bits beside quantized inputs take 7 on processors
    whose kernels add two products in 16 bits: what they compute with 8 is not what the layer says.
    """
    if activation is not None and isinstance(weight, Int) and weight.bits == 8 and not has_int8_dot_product():
        weight = replace(weight, bits=7)
    model = copy.deepcopy(model).eval()
    extremes: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            extremes[name] = (*args[0].aminmax(), *out.aminmax())

        return hook

    names = [name for name, layer in model.named_modules() if quantized_kind(layer)]
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    for name in names:
        layer = model.get_submodule(name)
        reads = activation if not isinstance(layer, nn.Embedding) else None
        writes = activation if name in outputs else None
        tensors = {f"weight_{key}": value for key, value in weight.encode(layer.weight).items()}
        for role, fmt, (low, high) in (
            ("input", reads, extremes[name][:2]),
            ("output", writes, extremes[name][2:]),
        ):
            if fmt is not None:
                scale, zero_point = fmt.scale_of(low, high)
                tensors |= {
                    f"{role}_scale": scale,
                    f"{role}_zero_point": torch.tensor(0) if zero_point is None else zero_point,
                }
        formats = {"weight": weight, "input": reads, "output": writes}
        config = {role: None if fmt is None else format_to_config(fmt) for role, fmt in formats.items()}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantize_layer(layer, tensors, config))
    return model


@pytest.fixture(name="quantize")
def _quantize() -> Callable[..., nn.Module]:
    return quantize
