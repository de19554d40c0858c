"""A layer's inputs and outputs as rows, a token or position each: all of them, or those at chosen places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.errors import ConfigError
from gracile.nn import QuantizedConv, QuantizedLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, QuantizedLinear)
_Size = tuple[int, ...]


def unfoldable(module: nn.Module) -> bool:
    """Whether `unfold_input` knows the layer."""
    if isinstance(module, _LINEAR):
        return True
    if isinstance(module, QuantizedConv):
        convolution = not module.transposed and len(module.kernel_size) < 3
    else:
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d))
    return convolution and not isinstance(module.padding, str) and module.padding_mode == "zeros"


def unfold_input(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs as the rows a layer's unfolded weight multiplies: [groups, tokens or positions, columns].

    Linear: the leading axes are tokens. Conv1d and Conv2d: im2col with the layer's stride, padding and dilation.
    Raises ConfigError for another kind of layer.
    """
    if isinstance(module, _LINEAR):
        return x.reshape(1, -1, x.shape[-1])
    if not unfoldable(module):
        raise ConfigError(f"Inputs of a {type(module).__name__} cannot be unfolded into the rows of its weight.")
    groups: int = module.groups  # type: ignore[assignment]
    x, kernel, stride, padding, dilation = _as_2d(module, x)
    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)  # [batch, in·k, positions]
    batch, width, positions = columns.shape
    split = columns.reshape(batch, groups, width // groups, positions)
    return split.permute(1, 0, 3, 2).reshape(groups, batch * positions, width // groups)


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Outputs as [tokens or positions, channels]: a convolution's channels precede its positions, others' are last."""
    if isinstance(module, (*CONVOLUTIONS, QuantizedConv)):
        axis = y.ndim - len(module.kernel_size) - 1
        return y.movedim(axis, -1).reshape(-1, y.shape[axis])
    return y.reshape(-1, y.shape[-1])


def count_rows(layer: nn.Module, x: Tensor) -> int:
    """How many tokens, or batch x positions of its output, the layer's input holds."""
    if isinstance(layer, _LINEAR):
        return x[..., 0].numel()
    height, width = _output_size(*_as_2d(layer, x))
    return len(x) * height * width


def input_rows(layer: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """[n, columns]: what the layer's weight, flattened behind its first axis, multiplies at these tokens or positions.

    layer: linear, or a 1-d or 2-d convolution with zero padding; of a grouped one, the columns of all groups one after
    another. chosen: [n], indices below `count_rows`.
    """
    if isinstance(layer, _LINEAR):
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
    kernel, stride, padding, dilation = (tuple(size) for size in sizes)
    if len(layer.kernel_size) == 1:
        return x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    return x, kernel, stride, padding, dilation


def _output_size(x: Tensor, kernel: _Size, stride: _Size, padding: _Size, dilation: _Size) -> tuple[int, int]:
    height, width = (
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width
