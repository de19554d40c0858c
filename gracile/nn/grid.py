"""Training on grids whose scales are learned: what is rounded in every forward, and the gradients that pass it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gracile.formats import Codebook, Format, Int, Levels
from gracile.formats.codebook import nearest_code
from gracile.formats.granularity import from_rows, to_rows

#: One in so many examples of a batch tells the gradient of an activation's scale, at that share of the cost.
SCALE_SHARE = 4


class _WeightOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, fmt: Int | Levels, encoded: dict[str, Tensor]) -> Tensor:
        if isinstance(fmt, Levels):
            rows = to_rows(fmt.granularity, weight.float()) / scale.reshape(-1, 1)
            values = fmt.nearest(rows) * scale.reshape(-1, 1)
            decoded = from_rows(fmt.granularity, values, tuple(weight.shape)).to(weight.dtype)
            inside = from_rows(fmt.granularity, rows.abs() <= fmt.reach, tuple(weight.shape))
        else:
            decoded, inside = _round(weight, scale, fmt, encoded.get("zero_point"))
        ctx.save_for_backward(weight, scale, decoded, inside)
        ctx.granularity = fmt.granularity
        return _laid_out_as(weight, decoded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        weight, scale, decoded, inside = ctx.saved_tensors
        gradient = gradients[0]
        slope = to_rows(ctx.granularity, (gradient * (decoded - inside * weight)).float()).sum(1)
        # A weight beyond the range may come back: descent then moves it towards zero, which both ends lie around.
        passed = gradient * (inside | (gradient * weight > 0))
        return _laid_out_as(weight, passed), slope.reshape(scale.shape) / scale, None, None


class _WeightOnLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor) -> Tensor:
        codes = nearest_code(weight.float(), levels)
        ctx.save_for_backward(codes)
        ctx.count = len(levels)
        return _laid_out_as(weight, levels[codes].to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        gradient = gradients[0].float()
        slope = gradient.new_zeros(ctx.count).index_add_(0, codes.flatten(), gradient.flatten())
        return gradients[0], slope


class _FormatOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, fmt: Format, encoded: dict[str, Tensor]) -> Tensor:
        given = {name: tensor for name, tensor in encoded.items() if name not in ("codes", "shape")}
        return _laid_out_as(weight, fmt.decode(fmt.encode(weight, **given)).to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


class _InputOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
        low, high = qmin - zero_point, qmax - zero_point
        y = torch.div(x, scale).clamp_(low, high).round_().mul_(scale)
        ctx.save_for_backward(x, scale, y)
        ctx.bounds = (low - 0.5, high + 0.5)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, scale, y = ctx.saved_tensors
        step = float(scale)
        # One fused pass: the gradient where x lies between the outermost halves of steps, zero elsewhere.
        passed = torch.ops.aten.hardtanh_backward(gradients[0], x, ctx.bounds[0] * step, ctx.bounds[1] * step)
        some = slice(0, max(1, len(x) // SCALE_SHARE)) if x.ndim else ...
        slope = (gradients[0][some] * y[some]).addcmul_(passed[some], x[some], value=-1).sum(dtype=torch.float32)
        slope *= x.numel() / max(1, x[some].numel()) / scale
        return passed, slope, None, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, change: Tensor, count: int) -> Tensor:
        learned = scale * change.exp()
        ctx.save_for_backward(learned)
        ctx.count = count
        return learned

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (learned,) = ctx.saved_tensors
        return None, gradients[0] * learned / math.sqrt(ctx.count), None


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, levels: Tensor, change: Tensor, count: int) -> Tensor:
        span = levels.abs().max() * (levels != 0)
        ctx.save_for_backward(span)
        ctx.count = count
        return torch.addcmul(levels, span, change)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (span,) = ctx.saved_tensors
        return None, gradients[0] * span / math.sqrt(ctx.count), None


def weight_on_grid(weight: Tensor, fmt: Format, encoded: dict[str, Tensor]) -> Tensor:
    """Q(w) = decode(encode(w)) on the grid given, with dQ/dw = 1 inside the grid's range, and outside it 1 or 0.

    encoded: the tensors of the format that hold the grid ("scale", "zero_point"); their "codes" are not read. Where the
    format is Int or Levels, the scale s has the gradient of LSQ (Esser et al. 2019, arXiv:1902.08153, equation 3) for
    any levels: dQ/ds = (Q − w) / s inside, Q / s outside. The weight's is the straight-through estimator of Bengio et
    al. (2013); beyond the grid's range only what moves the weight back is passed on. With nothing passed on there, as
    in LSQ, weights that cross an end never return, and in two bits either end is near for all of them. A codebook's
    levels have the sum of the gradients of the weights that are on them (Han et al. 2015, arXiv:1510.00149, eq. 3).
    """
    if isinstance(fmt, Codebook):
        chosen: Tensor = _WeightOnLevels.apply(weight, encoded["levels"])  # type: ignore[no-untyped-call]
        return chosen
    if isinstance(fmt, (Int, Levels)):
        result: Tensor = _WeightOnGrid.apply(weight, encoded["scale"], fmt, encoded)  # type: ignore[no-untyped-call]
        return result
    fixed: Tensor = _FormatOnGrid.apply(weight, fmt, encoded)  # type: ignore[no-untyped-call]
    return fixed


def input_on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """scale · (clip(round(x / scale) + zero_point, qmin, qmax) − zero_point), in the dtype of x, gradients as above.

    x: [examples, ...] of any float dtype, in which it is computed. scale: [] float32; its gradient is estimated from a
    quarter of the examples. zero_point: [] any integer dtype; it has no gradient.
    """
    result: Tensor = _InputOnGrid.apply(x, scale, int(zero_point), qmin, qmax)  # type: ignore[no-untyped-call]
    return result


def learned_scale(scale: Tensor, change: Tensor, count: int) -> Tensor:
    """s = scale · exp(change): of one sign whatever is learned, and moved by shares of itself, however large it is.

    scale, change: the same shape. count: values that share one scale, times the highest code. As in LSQ (section 2.2
    there) the gradient is divided by √count, so that plain gradient descent changes scales no faster than weights; Adam
    is blind to the factor.
    """
    result: Tensor = _Learned.apply(scale, change, count)  # type: ignore[no-untyped-call]
    return result


def learned_levels(levels: Tensor, change: Tensor, count: int) -> Tensor:
    """levels + max |levels| · change, ascending again; a level of 0 stays, so that pruned weights do.

    levels, change: [k]. count: values on all levels; √(count / k) divides the gradient, as in `learned_scale`.
    """
    moved: Tensor = _Moved.apply(levels, change, max(1, count // len(levels)))  # type: ignore[no-untyped-call]
    return moved.sort().values


def _laid_out_as(weight: Tensor, values: Tensor) -> Tensor:
    """Values in the memory format of the weight, by which convolutions choose theirs."""
    return torch.empty_like(weight).copy_(values)


def _round(weight: Tensor, scale: Tensor, fmt: Int, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight on its grid, and where it lies inside the grid's range."""
    q = torch.round(to_rows(fmt.granularity, weight.float()) / scale.reshape(-1, 1))
    if zero_point is not None:
        q += zero_point.reshape(-1, 1)
    inside = from_rows(fmt.granularity, (q >= fmt.qmin).logical_and_(q <= fmt.qmax), tuple(weight.shape))
    q.clamp_(fmt.qmin, fmt.qmax)
    if zero_point is not None:
        q -= zero_point.reshape(-1, 1)
    decoded = from_rows(fmt.granularity, q.mul_(scale.reshape(-1, 1)), tuple(weight.shape))
    return decoded.to(weight.dtype), inside


class TrainsOnGrid(nn.Module, ABC):
    """A layer that can hold its encoded weight as a float parameter for a while."""

    @abstractmethod
    def begin_training(self, original: Tensor | None = None) -> None: ...

    @abstractmethod
    def end_training(self) -> None: ...

    @abstractmethod
    def hold_weight_of(self, other: Any) -> None: ...

    def keep_size(self) -> None:
        """Bring the trained weight back to the size it began with, where the size says nothing; else do nothing."""


def begin_training(model: nn.Module, original: nn.Module | None = None) -> None:
    """Give every quantized layer float parameters: its weight, rounded in every forward, and its scales.

    original: the model before all compression, whose weights of the same name and shape say where in its cell each
    weight starts; the function is the same. Layers that hold one weight train one.
    """
    weights = {} if original is None else dict(original.named_parameters())
    for name, module, holder in _with_holders(model):
        own, recurrent = f"{name}.weight" if name else "weight", name.replace(".encoded.", ".")
        module.begin_training(weights.get(own, weights.get(recurrent)))
        if holder is not module:
            module.hold_weight_of(holder)


def end_training(model: nn.Module) -> None:
    """Encode what was trained, on the grids it was trained on, and drop the parameters; outputs stay what they were."""
    for _, module, holder in _with_holders(model):
        module.end_training()
        if holder is not module:
            module.hold_weight_of(holder)


def _with_holders(model: nn.Module) -> list[tuple[str, TrainsOnGrid, TrainsOnGrid]]:
    """Layers by name, each with the first that holds its weight, which mostly is itself."""
    first: dict[int, TrainsOnGrid] = {}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, TrainsOnGrid):
            weight = module._parameters.get("weight", module._buffers.get("weight_codes"))
            found.append((name, module, first.setdefault(id(module if weight is None else weight), module)))
    return found


def keep_sizes(model: nn.Module) -> None:
    """Bring weights whose size says nothing back to the one they began to train with."""
    for module in model.modules():
        if isinstance(module, TrainsOnGrid):
            module.keep_size()


def freeze_batch_norms(model: nn.Module) -> None:
    """Let the batch norms that stand behind quantized layers while these train keep the statistics they have."""
    for module in model.modules():
        norm = getattr(module, "batch_norm", None) if isinstance(module, TrainsOnGrid) else None
        if isinstance(norm, nn.Module):
            norm.eval()
