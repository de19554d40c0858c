"""Batch norm folded into the layer before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gracile.surgery import Swap, apply


def fold_batch_norms(model: nn.Module, pairs: Iterable[tuple[str, str]], layers: set[str]) -> list[tuple[str, str]]:
    """W ← W · γ/√(σ² + ε), b ← (b − μ) · γ/√(σ² + ε) + β for every pair whose layer is among `layers`; returns them.

    pairs: (layer, batch norm) where the batch norm reads exactly the layer's output and nothing else does. The batch
    norm becomes an identity, and the layer has a bias afterwards. Both parameters of the layer are new ones.
    """
    folded = []
    for name, norm_name in pairs:
        layer: Any = model.get_submodule(name)
        norm: Any = model.get_submodule(norm_name)
        if name not in layers or norm.running_mean is None:
            continue
        with torch.no_grad():
            factor = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                factor = factor * norm.weight.double()
            bias = (
                -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
            )
            bias = bias * factor + (0 if norm.bias is None else norm.bias.double())
            axis = 1 if getattr(layer, "transposed", False) else 0
            view = [1] * layer.weight.ndim
            if axis == 1 and layer.groups > 1:  # [in, out / groups, ...]: the factor differs by group of input rows
                per_group = factor.view(layer.groups, 1, -1).expand(-1, layer.weight.shape[0] // layer.groups, -1)
                scaled = layer.weight.double() * per_group.reshape(*layer.weight.shape[:2], *view[2:])
            else:
                view[axis] = -1
                scaled = layer.weight.double() * factor.view(view)
            folded_weight = scaled.to(layer.weight.dtype)
            layer.weight = nn.Parameter(folded_weight, requires_grad=layer.weight.requires_grad)
            layer.bias = nn.Parameter(bias.to(folded_weight.dtype))
        apply(model, [Swap(norm_name, "Identity")])
        folded.append((name, norm_name))
    return folded
