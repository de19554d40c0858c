"""What all layers with encoded weights, and inputs and outputs on a grid, have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import ConfigError
from gracile.formats import Codebook, Format, Int, Levels, PerTensor, format_from_config, format_to_config, is_dynamic
from gracile.formats.granularity import from_rows, to_rows
from gracile.nn.cells import start_in_cells
from gracile.nn.grid import TrainsOnGrid, input_on_grid, learned_levels, learned_scale, weight_on_grid
from gracile.nn.ops import decode, quantize_dequantize, quantize_dequantize_per_token


class QuantizedLayer(TrainsOnGrid):
    """y = Q_out(f(Q_in(x), W, bias)), W = decode(buffers), f the operator of the float layer it replaces.

    Buffers: "weight_" + the name of each tensor that the weight's format encodes to (weight_codes, weight_scale, ...);
    input_scale [] float32 and input_zero_point [] int32 where inputs have a format; the same for the output.
    `weight` reads the decoded weight. While training on the grid it is a float parameter, and so is the logarithm of
    what each scale was changed by (weight_scale_change, input_scale_change, ...), and of a codebook's levels their
    change itself (weight_levels_change); see `begin_training`. A solver that
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
            if fmt is not None and not is_dynamic(fmt):
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

    def hold_weight_of(self, other: QuantizedLayer) -> None:
        """Hold the very tensors of another layer's weight, of the same shape and format; also while both train."""
        assert (self.weight_shape, self._format_json) == (other.weight_shape, other._format_json)
        for name in self.weight_tensors:
            self._buffers[f"weight_{name}"] = other._buffers[f"weight_{name}"]
        for name in ("weight", "weight_scale_change", "weight_levels_change"):
            if name in other._parameters:
                self._parameters[name] = other._parameters[name]

    def set_range(self, role: str, scale: Tensor, zero_point: Tensor | None) -> None:
        """Set the grid of the "input" or the "output": scale [], and zero point [] (None: 0)."""
        getattr(self, f"{role}_scale").fill_(scale.detach().reshape(()))
        getattr(self, f"{role}_zero_point").fill_(0 if zero_point is None else int(zero_point))

    def encoded_weight(self) -> dict[str, Tensor]:
        """The weight as its format encodes it, with "shape"."""
        tensors = {name: getattr(self, f"weight_{name}") for name in self.weight_tensors}
        return {**tensors, "shape": torch.tensor(self.weight_shape, dtype=torch.int64)}

    @property
    def input_range(self) -> tuple[float, float] | None:
        """The lowest and the highest input that has a code; None where inputs have no grid that is fixed."""
        fmt = self.input_format
        if fmt is None or is_dynamic(fmt):
            return None
        scale, zero_point = float(self._scale("input").detach()), int(self.input_zero_point)  # type: ignore[arg-type]
        return scale * (fmt.qmin - zero_point), scale * (fmt.qmax - zero_point)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that decode to zero."""
        return float((self.decoded_weight() == 0).float().mean())

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
        Codes that are not the nearest to it were solved for, trained, or come of refitted weights: their values start
        at them.
        """
        if self.trains:
            return
        weight = self.decoded_weight().clone()
        if original is not None and original.shape == weight.shape and self.weight_format.step:
            prior = self._as_encoded(original.detach().to(weight))
            weight = self._within_cells(weight, torch.where(weight == 0, 0.0, prior) if self.sparse else prior)
        for role in self._learned_roles():
            scale: Tensor = getattr(self, f"{role}_scale")
            self.register_parameter(f"{role}_scale_change", nn.Parameter(torch.zeros_like(scale)))
        if isinstance(self.weight_format, Codebook):
            levels: Tensor = self.weight_levels  # type: ignore[assignment]
            self.register_parameter("weight_levels_change", nn.Parameter(torch.zeros_like(levels)))
        self._parameters["weight"] = nn.Parameter(weight)

    def _as_encoded(self, original: Tensor) -> Tensor:
        """An original weight in the coordinates of the one that is encoded."""
        return original

    def _within_cells(self, weight: Tensor, original: Tensor) -> Tensor:
        """The weight where in its codes' cells it is nearest to the original (`start_in_cells`)."""
        fmt: Any = self.weight_format
        scale: Tensor = self.weight_scale  # type: ignore[assignment]
        wide = scale.abs().reshape(-1, 1).expand_as(to_rows(fmt.granularity, weight))
        step = fmt.step * from_rows(fmt.granularity, wide, self.weight_shape)
        far = torch.full_like(weight, 1e6) * step.amax()  # rounds to the ends of any grid
        ends = [weight_on_grid(sign * far, fmt, self.encoded_weight()) for sign in (-1, 1)]
        rows = [t.flatten(1) for t in (weight, original, step, *ends)]
        return start_in_cells(*rows).reshape(self.weight_shape)

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
        self._parameters.pop("weight_levels_change", None)

    def _learned_roles(self) -> tuple[str, ...]:
        """Of weight, input and output those whose scale is learned: any but scales that a format bounds itself."""
        formats = {"weight": self.weight_format, "input": self.input_format, "output": self.output_format}
        return tuple(r for r, fmt in formats.items() if isinstance(fmt, (Int, Levels)) and not is_dynamic(fmt))

    def _learned_grid(self) -> dict[str, Tensor]:
        """The learned scale or levels of the weight by their name, where there are any."""
        moved = self._parameters.get("weight_levels_change")
        if moved is not None:
            levels: Tensor = self.weight_levels  # type: ignore[assignment]
            return {"levels": learned_levels(levels, moved, math.prod(self.weight_shape))}
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
        if is_dynamic(fmt):
            y = quantize_dequantize_per_token(x, fmt.qmax)
            return torch.where(torch.rand_like(x) < self.drop, x, y) if self.trains and self.drop else y
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


def _activation_format(config: dict[str, Any], role: str) -> Int | None:
    fmt = format_from_config(config.get(role))
    if fmt is None or (isinstance(fmt, Int) and isinstance(fmt.granularity, PerTensor)):
        return fmt
    if role == "input" and is_dynamic(fmt) and fmt.symmetric:
        return fmt  # type: ignore[no-any-return]
    raise ConfigError(
        f"The {role} of a layer cannot take the format {fmt}.\n"
        f"  Use Int(bits, PerTensor()), for inputs also Int(bits, PerToken()), or None."
    )
