"""Rows of a layer's inputs and outputs at chosen tokens or positions, without unfolding all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.stats.collect import output_rows

_Size = tuple[int, ...]


def count_rows(layer: nn.Module, x: Tensor) -> int:
    """How many tokens, or batch x positions of its output, the layer's input holds."""
    if isinstance(layer, nn.Linear):
        return x[..., 0].numel()
    height, width = _output_size(*_as_2d(layer, x))
    return len(x) * height * width


def input_rows(layer: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """[n, columns]: what the layer's weight, flattened behind its first axis, multiplies at these tokens or positions.

    layer: linear, or an ungrouped 1-d or 2-d convolution with zero padding. chosen: [n], indices below `count_rows`.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[chosen]
    x, kernel, stride, padding, dilation = _as_2d(layer, x)
    height, width = _output_size(x, kernel, stride, padding, dilation)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).movedim(1, -1).contiguous()
    image, position = chosen // (height * width), chosen % (height * width)
    offsets = [torch.arange(kernel[i], device=x.device) * dilation[i] for i in (0, 1)]
    rows = (position // width * stride[0])[:, None, None] + offsets[0][:, None]
    columns = (position % width * stride[1])[:, None, None] + offsets[1]
    return x[image[:, None, None], rows, columns].movedim(-1, 1).flatten(1)  # [n, in, k, k], as the weight is


def rows_at(layer: nn.Module, y: Tensor, chosen: Tensor) -> Tensor:
    """[n, channels] of an output of the layer, or of a tensor of its shape."""
    return output_rows(layer, y)[chosen]


def _as_2d(layer: Any, x: Tensor) -> tuple[Tensor, _Size, _Size, _Size, _Size]:
    """The input, kernel, stride, padding and dilation, of a 1-d convolution with a height of one."""
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, nn.Conv1d):
        kernel, stride, padding, dilation = (tuple(size) for size in sizes)
        return x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    kernel, stride, padding, dilation = (tuple(size) for size in sizes)
    return x, kernel, stride, padding, dilation


def _output_size(x: Tensor, kernel: _Size, stride: _Size, padding: _Size, dilation: _Size) -> tuple[int, int]:
    height, width = (
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width
