"""Layers with encoded weights, and inputs and outputs on a grid: linear, convolution, embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.errors import ConfigError
from gracile.formats import PerChannel, is_dynamic
from gracile.nn.quantized import QuantizedLayer


class QuantizedLinear(QuantizedLayer):
    """`nn.Linear` with an encoded weight [out, in]."""

    def __init__(self, old: nn.Module, config: dict[str, Any]) -> None:
        super().__init__(old, config)
        self.out_features, self.in_features = self.weight_shape
        self.input_multiplier: Tensor | None
        ones = torch.ones(self.in_features, device=old.weight.device)  # type: ignore[arg-type,union-attr]
        self.register_buffer("input_multiplier", ones if config.get("smooth") else None)

    def _as_encoded(self, original: Tensor) -> Tensor:
        return original if self.input_multiplier is None else original / self.input_multiplier

    def on_input_grid(self, x: Tensor) -> Tensor:
        return super().on_input_grid(x if self.input_multiplier is None else x * self.input_multiplier.to(x.dtype))

    def forward(self, input: Tensor) -> Tensor:
        x = self.on_input_grid(input)
        return self._quantized("output", F.linear(x, self._weight_as(x), self.bias))


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
#: Least γ of a batch norm while its layer trains.
SMALLEST_GAIN = 1e-6
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CONV_SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
)


class QuantizedConv(QuantizedLayer):
    """A convolution of 1 to 3 dimensions, grouped or transposed too, with an encoded weight.

    Weight: [out, in / groups, *kernel]; transposed [in, out / groups, *kernel]. Where a batch norm was folded into it,
    one stands behind it again while it trains on its grid: few bits train badly without. It is folded into the scales
    of the output channels and the bias when training ends, which is exact but for rounding in float32.
    """

    batch_norm: Any  # a batch norm while it trains, else None

    def __init__(self, old: nn.Module, config: dict[str, Any]) -> None:
        """config: as in `QuantizedLayer`; {"batch_norm": eps} says that a batch norm of this ε was folded into it."""
        super().__init__(old, config)
        if is_dynamic(self.input_format):
            raise ConfigError("Inputs of a convolution have no tokens.\n  Use Int(bits, PerTensor()) or None.")
        for name in _CONV_SETTINGS:
            setattr(self, name, getattr(old, name))
        self._reversed_padding_repeated_twice = list(getattr(old, "_reversed_padding_repeated_twice", ()))
        self.batch_norm = None
        by_channel = getattr(self.weight_format, "granularity", None) == PerChannel(0) and not self.transposed
        self._epsilon = config.get("batch_norm") if by_channel and self.bias is not None else None

    def begin_training(self, original: Tensor | None = None) -> None:
        """As any quantized layer, and with a batch norm whose statistics are still to be restated to what arrives."""
        begun = self.trains
        super().begin_training(None if self.transposed else original)
        if begun or self._epsilon is None:
            return
        assert self.bias is not None
        norm: Any = _BATCH_NORMS[len(self.kernel_size)](self._outputs(self), eps=float(self._epsilon))
        norm.to(self.bias).train(self.training)
        gain = self._unfold()
        with torch.no_grad():
            norm.weight.copy_(gain * (norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(self.bias)
        self.batch_norm = norm
        self._sizes = _sizes(self._parameters["weight"])  # type: ignore[arg-type]

    def keep_size(self) -> None:
        """Bring each channel's weight back to the size it began with, while a batch norm behind it takes each batch's.

        What such a layer gives does not depend on the size of its weight and its grid together, and no gradient holds
        it: the steps of an optimizer make the weight ever larger, faster than the learned scale follows, until most of
        it lies beyond the ends of the grid.
        """
        if self.batch_norm is not None and self.batch_norm.training:
            weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
            with torch.no_grad():
                weight.mul_(self._sizes / _sizes(weight))

    def _unfold(self) -> Tensor:
        """Divide each channel's weight by a power of two, [out], so that its size is what optimizers are used to.

        Behind a batch norm the size of a channel's weight says nothing, but it makes the steps of a learning rate large
        or small: folding left them as the batch norm's gains have it. Afterwards it is near √(2 / fan-in), He's.
        """
        with torch.no_grad():
            weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
            size = weight.flatten(1).square().mean(1).sqrt()
            gain = torch.exp2(torch.round(torch.log2(size / math.sqrt(2 / weight[0].numel()))))
            gain = torch.where((gain > 0) & torch.isfinite(gain), gain, torch.ones_like(gain))
            weight.div_(gain.view(-1, *[1] * (weight.ndim - 1)))
            self._buffers["weight_scale"] = self.weight_scale / gain
        return gain

    def end_training(self) -> None:
        """As any quantized layer; afterwards the batch norm is part of the scales and the bias."""
        norm, self.batch_norm = self.batch_norm, None
        super().end_training()
        if norm is None:
            return
        with torch.no_grad():
            gain, bias = _gain_and_bias(norm)
            self._buffers["weight_scale"] = self.weight_scale * gain.to(self.weight_scale)
            self.bias.copy_(bias)  # type: ignore[union-attr]

    def forward(self, input: Tensor) -> Tensor:
        x, norm = self.on_input_grid(input), self.batch_norm
        if norm is None:
            return self._quantized("output", self._convolve(x, self._weight_as(x), self.bias))
        with torch.no_grad():  # a channel's scale stays positive
            norm.weight.clamp_(min=SMALLEST_GAIN)
        if norm.training or not self.training:
            return self._quantized("output", norm(self._convolve(x, self._weight_as(x), None)))
        # It keeps its statistics: the same as a factor of the weight and a shift, which spares passes over the outputs.
        gain, bias = _gain_and_bias(norm)
        weight = self._weight_as(x) * gain.view(-1, *[1] * (len(self.weight_shape) - 1)).to(x.dtype)
        return self._quantized("output", self._convolve(x, weight, bias.to(x.dtype)))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dimensions = len(self.kernel_size)
        if self.transposed:
            return _TRANSPOSED[dimensions](
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _CONVOLUTIONS[dimensions](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _outputs(self, old: nn.Module) -> int:
        return int(old.out_channels)  # type: ignore[arg-type]


def _gain_and_bias(norm: Any) -> tuple[Tensor, Tensor]:
    """g and b, [out] each, with g x + b what a batch norm gives by the statistics it holds."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - norm.running_mean * gain


def _sizes(weight: Tensor) -> Tensor:
    """The root mean square of each channel's weight, to be divided by; 1 where it is zero."""
    size = weight.detach().flatten(1).square().mean(1).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size)).view(-1, *[1] * (weight.ndim - 1))


class QuantizedEmbedding(QuantizedLayer):
    """`nn.Embedding` with an encoded table [rows, width]."""

    def __init__(self, old: nn.Module, config: dict[str, Any]) -> None:
        super().__init__(old, {**config, "bias": False})
        if config.get("input") is not None:
            raise ConfigError("An embedding takes indices, which have no number format.\n  Leave its input format out.")
        self.num_embeddings, self.embedding_dim = self.weight_shape
        self.padding_idx = old.padding_idx
        self.table_dtype: torch.dtype = old.weight.dtype  # type: ignore[assignment,union-attr]

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.decoded_weight(), self.padding_idx)  # type: ignore[arg-type]
        return self._quantized("output", rows if rows.dtype == self.table_dtype else rows.to(self.table_dtype))


_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "QuantizedLinear",
    nn.Conv1d: "QuantizedConv",
    nn.Conv2d: "QuantizedConv",
    nn.Conv3d: "QuantizedConv",
    nn.ConvTranspose1d: "QuantizedConv",
    nn.ConvTranspose2d: "QuantizedConv",
    nn.ConvTranspose3d: "QuantizedConv",
    nn.Embedding: "QuantizedEmbedding",
}


def quantized_kind(layer: nn.Module) -> str | None:
    """Name of the quantized class that can stand for a layer; None where there is none.

    A subclass with a forward of its own has none, and neither has an embedding that renormalises its table.
    """
    for base, kind in _KINDS.items():
        if isinstance(layer, base) and type(layer).forward is base.forward:
            return None if getattr(layer, "max_norm", None) is not None else kind
    return None
