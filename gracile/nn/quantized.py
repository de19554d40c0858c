"""Layers with encoded weights, and inputs and outputs on a grid: linear, convolution, embedding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.errors import ConfigError
from gracile.formats import Format, Int, Levels, PerChannel, PerTensor, format_from_config, format_to_config
from gracile.formats.granularity import from_rows, to_rows
from gracile.nn.grid import TrainsOnGrid, input_on_grid, learned_scale, weight_on_grid
from gracile.nn.ops import decode, quantize_dequantize

#: How far from a grid point, in steps, a weight may start to train: not quite the half that would round it elsewhere.
CELL = 0.49


class QuantizedLayer(TrainsOnGrid):
    """y = Q_out(f(Q_in(x), W, bias)), W = decode(buffers), f the operator of the float layer it replaces.

    Buffers: "weight_" + the name of each tensor that the weight's format encodes to (weight_codes, weight_scale, ...);
    input_scale [] float32 and input_zero_point [] int32 where inputs have a format; the same for the output.
    `weight` reads the decoded weight. While training on the grid it is a float parameter, and so is the logarithm of
    what each scale was changed by (weight_scale_change, input_scale_change, ...); see `begin_training`. A solver that
    chooses roundings by gradient meanwhile sets `rounding`, what gives the weight in place of the rounded parameter,
    and `drop`, the probability that a value of the input stays off the grid.
    """

    def __init__(self, old: nn.Module, config: dict[str, Any]) -> None:
        """Room for the tensors, not yet the right values.

        config: {"weight": format, "input": format or None, "output": format or None} as `format_to_config` writes them;
            {"bias": true} gives the layer a bias that the old one lacks. {"smooth": true} multiplies a linear layer's
            inputs by a buffer `input_multiplier` [in] before they are put on their grid. {"sparse": true} says that the
            weight was pruned before it was rounded, so that its zeros are to be kept.
        """
        super().__init__()
        self.sparse = bool(config.get("sparse"))
        self.rounding: Callable[[], Tensor] | None = None
        self.drop = 0.0
        self.weight_format: Format = format_from_config(config["weight"])
        self.input_format = _activation_format(config, "input")
        self.output_format = _activation_format(config, "output")
        weight: Tensor = old.weight  # type: ignore[assignment]
        self.weight_shape = tuple(weight.shape)
        self._format_json = json.dumps(format_to_config(self.weight_format))
        empty = self.weight_format.encode(torch.zeros(self.weight_shape, device=weight.device))
        self.weight_tensors = tuple(name for name in empty if name != "shape")
        for name in self.weight_tensors:
            self.register_buffer(f"weight_{name}", empty[name])
        for role, fmt in (("input", self.input_format), ("output", self.output_format)):
            if fmt is not None:
                self.register_buffer(f"{role}_scale", torch.ones((), device=weight.device))
                self.register_buffer(f"{role}_zero_point", torch.zeros((), dtype=torch.int32, device=weight.device))
        bias = getattr(old, "bias", None)
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        elif config.get("bias"):
            self.bias = nn.Parameter(torch.zeros(self._outputs(old), device=weight.device, dtype=weight.dtype))
        else:
            self.register_parameter("bias", None)

    def set_weight(self, tensors: dict[str, Tensor]) -> None:
        """Store what the weight's format encoded ("codes", "scale", ...; "shape" is not needed)."""
        for name in self.weight_tensors:
            buffer: Tensor = getattr(self, f"weight_{name}")
            assert tensors[name].shape == buffer.shape, f"{name}: {tensors[name].shape}, not {buffer.shape}"
            self._buffers[f"weight_{name}"] = tensors[name].detach().to(buffer.device)

    def set_range(self, role: str, scale: Tensor, zero_point: Tensor | None) -> None:
        """Set the grid of the "input" or the "output": scale [], and zero point [] (None: 0)."""
        getattr(self, f"{role}_scale").fill_(scale.detach().reshape(()))
        getattr(self, f"{role}_zero_point").fill_(0 if zero_point is None else int(zero_point))

    def encoded_weight(self) -> dict[str, Tensor]:
        """The weight as its format encodes it, with "shape"."""
        tensors = {name: getattr(self, f"weight_{name}") for name in self.weight_tensors}
        return {**tensors, "shape": torch.tensor(self.weight_shape, dtype=torch.int64)}

    def decoded_weight(self) -> Tensor:
        """The float32 weight that the layer computes with, in the shape of the layer it replaced."""
        if self.rounding is not None:
            return self.rounding()
        trained = self._parameters.get("weight")
        if trained is not None:
            return weight_on_grid(trained, self.weight_format, self.encoded_weight() | self._learned_grid())
        tensors = [getattr(self, f"weight_{name}") for name in self.weight_tensors]
        return decode(tensors, ",".join(self.weight_tensors), self._format_json, self.weight_shape)

    @property
    def trains(self) -> bool:
        """Whether the layer is training on its grid."""
        return self._parameters.get("weight") is not None

    def begin_training(self, original: Tensor | None = None) -> None:
        """Hold the weight as a float parameter that every forward puts on the grid, and learn the grids' scales.

        original: the float weight before all compression; of a weight of the same shape, each value starts where its
        code's cell is nearest to it, up to a factor for each row, and so nearer to the codes that it might change to.
        """
        if self.trains:
            return
        weight = self.decoded_weight().clone()
        if original is not None and original.shape == weight.shape and isinstance(self.weight_format, Int):
            weight = self._within_cells(weight, self._as_encoded(original.detach().to(weight)))
        for role in self._learned_roles():
            scale: Tensor = getattr(self, f"{role}_scale")
            self.register_parameter(f"{role}_scale_change", nn.Parameter(torch.zeros_like(scale)))
        self._parameters["weight"] = nn.Parameter(weight)

    def _as_encoded(self, original: Tensor) -> Tensor:
        """An original weight in the coordinates of the one that is encoded."""
        return original

    def _within_cells(self, weight: Tensor, original: Tensor) -> Tensor:
        """Of every code's cell the point that is nearest to the original, fitted to the weight row by row."""
        assert isinstance(self.weight_format, Int)
        rows, priors = weight.flatten(1), original.flatten(1)
        factor = (rows * priors).sum(1, keepdim=True) / priors.square().sum(1, keepdim=True).clamp_min(1e-30)
        granularity, shape = self.weight_format.granularity, self.weight_shape
        scale: Tensor = self.weight_scale  # type: ignore[assignment]
        wide = scale.reshape(-1, 1).expand_as(to_rows(granularity, weight))
        reach = CELL * from_rows(granularity, wide, shape)
        wanted = torch.where(factor > 0, factor * priors, rows).reshape(shape)
        return torch.maximum(torch.minimum(wanted, weight + reach), weight - reach)

    def end_training(self) -> None:
        """Encode the trained weight on the grid it was trained on; the decoded weight stays exactly what it was."""
        if not self.trains:
            return
        grid = {name: getattr(self, f"weight_{name}") for name in self.weight_tensors if name != "codes"}
        with torch.no_grad():
            self.set_weight(self.weight_format.encode(self.decoded_weight(), **(grid | self._learned_grid())))
            for role in self._learned_roles():
                if role != "weight":
                    self._buffers[f"{role}_scale"] = self._scale(role)
                del self._parameters[f"{role}_scale_change"]
        del self._parameters["weight"]

    def _learned_roles(self) -> tuple[str, ...]:
        """Of weight, input and output those whose scale is learned: any but scales that a format bounds itself."""
        formats = {"weight": self.weight_format, "input": self.input_format, "output": self.output_format}
        return tuple(role for role, fmt in formats.items() if isinstance(fmt, (Int, Levels)))

    def _learned_grid(self) -> dict[str, Tensor]:
        """The learned scale of the weight by its name, where there is one."""
        if "weight" not in self._learned_roles():
            return {}
        scale = self._buffers["weight_scale"]
        assert scale is not None
        return {"scale": self._scale("weight", math.prod(self.weight_shape) // scale.numel())}

    def _scale(self, role: str, count: int = 1) -> Tensor:
        """The scale of the weight, the input or the output; `count` values share it."""
        scale: Tensor = getattr(self, f"{role}_scale")
        change = self._parameters.get(f"{role}_scale_change")
        if change is None:
            return scale
        fmt = getattr(self, f"{role}_format")
        highest = fmt.qmax if isinstance(fmt, Int) else 1
        return learned_scale(scale, change, max(1, count * highest))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.trains:  # some models read the weight of a layer, for its dtype or to tie it
            return self.decoded_weight()
        return super().__getattr__(name)

    def on_input_grid(self, x: Tensor) -> Tensor:
        """The input as the layer's operator gets it: on its grid, where it has one."""
        return self._quantized("input", x)

    def _weight_as(self, x: Tensor) -> Tensor:
        weight = self.decoded_weight()
        return weight if weight.dtype == x.dtype else weight.to(x.dtype)

    def _quantized(self, role: str, x: Tensor) -> Tensor:
        fmt = self.input_format if role == "input" else self.output_format
        if fmt is None:
            return x
        zero_point = getattr(self, f"{role}_zero_point")
        if self.trains:
            scale = self._scale(role, x.numel() // max(1, len(x)))
            y = input_on_grid(x, scale, zero_point, fmt.qmin, fmt.qmax)
            return torch.where(torch.rand_like(x) < self.drop, x, y) if role == "input" and self.drop else y
        return quantize_dequantize(x, getattr(self, f"{role}_scale"), zero_point, fmt.qmin, fmt.qmax)

    def _outputs(self, old: nn.Module) -> int:
        return self.weight_shape[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = state_dict.get(f"{prefix}weight_codes")  # the integer type of fixed-point codes depends on the weight
        if isinstance(codes, Tensor) and codes.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            self._buffers["weight_codes"] = self.weight_codes.to(codes.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        formats = [f"weight={self.weight_format}"]
        formats += [f"{r}={f}" for r, f in (("input", self.input_format), ("output", self.output_format)) if f]
        return f"{tuple(self.weight_shape)}, {', '.join(formats)}, bias={self.bias is not None}"


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
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            self._buffers["weight_scale"] = self.weight_scale * factor.to(self.weight_scale)
            self.bias.copy_(norm.bias - norm.running_mean * factor)  # type: ignore[union-attr]

    def forward(self, input: Tensor) -> Tensor:
        x = self.on_input_grid(input)
        if self.batch_norm is None:
            return self._quantized("output", self._convolve(x, self.bias))
        with torch.no_grad():  # a channel's scale stays positive
            self.batch_norm.weight.clamp_(min=SMALLEST_GAIN)
        return self._quantized("output", self.batch_norm(self._convolve(x, None)))

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, dimensions = self._weight_as(x), len(self.kernel_size)
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


def _activation_format(config: dict[str, Any], role: str) -> Int | None:
    fmt = format_from_config(config.get(role))
    if fmt is None or (isinstance(fmt, Int) and isinstance(fmt.granularity, PerTensor)):
        return fmt
    raise ConfigError(f"The {role} of a layer cannot take the format {fmt}.\n  Use Int(bits, PerTensor()) or None.")
