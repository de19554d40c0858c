"""Batch-norm and bias correction: the means and variances of the original, restored in a compressed copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gracile.data import Batch, Data, logits_of
from gracile.formats import Int, MidRise, PerChannel
from gracile.modes import eval_mode
from gracile.nn import QuantizedConv, QuantizedLayer, QuantizedLinear

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FLOOR = 1e-12  # of a variance in a ratio: a channel that is constant in both models keeps its stored variance
PIECE = 1 << 22  # values converted to double precision at a time: logits of a language model are many
MOST = 4.0  # by which a channel's scale is changed at most: a channel that is all but dead has no variance to match


@dataclass(frozen=True)
class Correction:
    """What `match_statistics` did: layers corrected, and the error on held-out batches before and after.

    error_before, error_after: ‖y − y₀‖² / ‖y₀‖² of the model's output against the original's.
    accepted: False where the correction did not lower the error, and was taken back.
    """

    layers: tuple[str, ...]
    error_before: float
    error_after: float
    accepted: bool


def match_statistics(
    model: nn.Module,
    original: nn.Module,
    data: Data,
    kept: Mapping[str, Tensor],
    *,
    biases: bool = True,
    gains: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Correction:
    """Correct stored batch-norm statistics and biases by the difference to the original on the same batches.

        mean ← stored mean + (mean of compressed − mean of original)
        variance ← stored variance · (variance of compressed / variance of original)
        bias ← bias + (mean output of original − mean output of compressed)

    and with `gains`, for quantized layers with a scale for each output channel and fewer than 8 bits,

        scale ← g · scale, g = √(variance of original's output / variance of compressed's), and the bias by the mean

    which is what re-estimating a batch norm would do, had it not been folded into them.

    Both models see the same batch side by side, and each layer of the compressed one already computes with the
    corrected values of that batch, as in re-estimation; corrections are averaged over batches. For an unchanged model
    this is the identity, whatever its stored statistics (plain re-estimation is not).

    kept: layer name -> indices of the original's output channels that the compressed layer still has; layers not named
    have them all. biases: also correct linear and convolution layers that have a bias (a batch norm
    behind one takes the shift out again). gains: correct none but the layers above.
    One batch in eight, at least one, is held out; the correction is kept if the model's output error there falls.
    """
    fitted, held_out = split_batches(data)
    layers = layers_of_few_bits(model, original) if gains else _correctable(model, original, biases)
    before = output_error(model, original, data, held_out)
    backup = {name: _state(model.get_submodule(name)) for name in layers}
    matcher = _Matcher(model, original, layers, kept, gains)
    with eval_mode(model, original), torch.no_grad(), matcher:
        for i, batch in enumerate(fitted):
            data.forward(original, batch)
            data.forward(model, batch)
            if on_batch is not None:
                on_batch(i + 1)
    matcher.store()
    after = output_error(model, original, data, held_out)
    accepted = after < before
    if not accepted:
        with torch.no_grad():
            for name, state in backup.items():
                for key, value in state.items():
                    getattr(model.get_submodule(name), key).copy_(value)
    return Correction(tuple(matcher.sums) if accepted else (), before, after, accepted)


def split_batches(data: Data) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches to fit on, and one in eight (at least one) to judge by; a lone batch serves as both."""
    batches = list(data.calibration_batches)
    if len(batches) < 2:
        return batches, batches
    return [b for i, b in enumerate(batches) if i % 8], batches[::8]


def _correctable(model: nn.Module, original: nn.Module, biases: bool) -> list[str]:
    others = dict(original.named_modules())
    return [
        name
        for name, module in model.named_modules()
        if name in others and (_is_tracking_norm(module, others[name]) or (biases and has_biased_channels(module)))
    ]


def layers_of_few_bits(model: nn.Module, original: nn.Module) -> list[str]:
    """Names of the quantized layers of fewer than 8 bits with a bias and a scale of its own for each output channel.

    Not those that hold their weight together with another layer.
    """
    others = dict(original.named_modules())
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    holders = Counter(id(m._buffers.get("weight_scale")) for m in found.values())
    return [
        name
        for name, m in found.items()
        if name in others and has_biased_channels(m) and has_gains(m) and holders[id(m.weight_scale)] == 1
    ]


def has_gains(module: nn.Module) -> bool:
    if not isinstance(module, (QuantizedLinear, QuantizedConv)) or getattr(module, "transposed", False):
        return False
    weight, given = module.weight_format, module.input_format
    by_channel = isinstance(weight, (Int, MidRise)) and weight.granularity == PerChannel(0)
    return by_channel and min(weight.bits, 8 if given is None else given.bits) < 8


def _is_tracking_norm(module: nn.Module, other: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and isinstance(other, BATCH_NORMS) and module.running_mean is not None


def has_biased_channels(module: nn.Module) -> bool:
    """Linear and convolution layers with a bias for each output, quantized ones too; what is only named so is not."""
    return isinstance(module, (nn.Linear, _ConvNd, QuantizedLinear, QuantizedConv)) and isinstance(module.bias, Tensor)


def _state(module: nn.Module) -> dict[str, Tensor]:
    keys = ["running_mean", "running_var"] if isinstance(module, BATCH_NORMS) else ["bias"]
    keys += ["weight_scale"] if has_gains(module) else []
    return {key: getattr(module, key).detach().clone() for key in keys}


def output_error(model: nn.Module, original: nn.Module, data: Data, batches: list[Batch]) -> float:
    """‖y − y₀‖² / ‖y₀‖² over the batches: the model's main output against the original's; infinity for other shapes."""
    error = scale = 0.0
    with eval_mode(model, original), torch.no_grad():
        for batch in batches:
            reference = logits_of(data.forward(original, batch))
            output = logits_of(data.forward(model, batch))
            if reference.shape != output.shape:
                return float("inf")
            error += _squared_distance(output, reference)
            scale += _squared_distance(reference)
    return error / max(scale, FLOOR)


class _Matcher:
    """Hooks on both models: the original's moments of a batch, and the compressed one corrected by them on the fly."""

    def __init__(
        self, model: nn.Module, original: nn.Module, layers: list[str], kept: Mapping[str, Tensor], gains: bool
    ) -> None:
        self.model, self.original, self.layers, self.kept, self.gains = model, original, layers, kept, gains
        self.moments: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}  # one for each call
        self.sums: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.stored = {name: _state(model.get_submodule(name)) for name in layers}
        self.handles: list[Any] = []

    def __enter__(self) -> _Matcher:
        for name in self.layers:
            norm = isinstance(self.model.get_submodule(name), BATCH_NORMS)
            reference, layer = self.original.get_submodule(name), self.model.get_submodule(name)
            if norm:
                self.handles.append(reference.register_forward_pre_hook(self._reference_input(name)))
                self.handles.append(layer.register_forward_pre_hook(self._correct_norm(name)))
            else:
                self.handles.append(reference.register_forward_hook(self._reference_output(name)))
                self.handles.append(layer.register_forward_hook(self._correct_bias(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _remember(self, name: str, rows: Tensor) -> None:
        variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
        if name in self.kept:
            indices = self.kept[name].to(mean.device)
            mean, variance = mean[indices], variance[indices]
        self.moments[name].append((mean, variance))

    def _reference_input(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._remember(name, args[0].movedim(1, -1).flatten(0, -2))

    def _reference_output(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # a layer's subclass may return more than its product
                self._remember(name, channel_rows(module, output))

        return hook

    def _correct_norm(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if not self.moments[name]:
                return
            rows = args[0].movedim(1, -1).flatten(0, -2)
            variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
            mean0, variance0 = self.moments[name].pop(0)
            new_mean = self.stored[name]["running_mean"].double() + (mean - mean0)
            ratio = torch.where(variance0 > FLOOR, variance / variance0.clamp_min(FLOOR), torch.ones_like(variance))
            new_variance = self.stored[name]["running_var"].double() * ratio
            self._accumulate(name, [new_mean, new_variance])
            module.running_mean.copy_(new_mean)
            module.running_var.copy_(new_variance)

        return hook

    def _correct_bias(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.moments[name] or not isinstance(output, Tensor):
                return None
            mean0, variance0 = self.moments[name].pop(0)
            view = [1] * output.ndim
            view[1 if _channel_first(module) else -1] = -1
            rows = channel_rows(module, output).double()
            if not self.gains:
                shift = mean0 - rows.mean(0)
                self._accumulate(name, [shift])
                return output + shift.to(output.dtype).view(view)
            variance, mean = torch.var_mean(rows, dim=0, correction=0)
            self._accumulate(name, [mean, variance, mean0, variance0])
            gain = gain_to(variance, variance0)
            return output * gain.to(output.dtype).view(view) + (mean0 - gain * mean).to(output.dtype).view(view)

        return hook

    def _accumulate(self, name: str, values: list[Tensor]) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.sums:
            self.sums[name] = [a + b for a, b in zip(self.sums[name], values)]
        else:
            self.sums[name] = values

    def store(self) -> None:
        """Put the averages into the model."""
        with torch.no_grad():
            for name in self.layers:
                module: Any = self.model.get_submodule(name)
                if name not in self.sums:
                    continue
                averages = [total / self.counts[name] for total in self.sums[name]]
                if len(averages) == 2:  # mean and variance of a batch norm
                    module.running_mean.copy_(averages[0])
                    module.running_var.copy_(averages[1])
                elif self.gains:
                    mean, variance, mean0, variance0 = averages
                    gain = gain_to(variance, variance0)
                    module.weight_scale.mul_(gain.to(module.weight_scale.dtype).view(module.weight_scale.shape))
                    module.bias.copy_(gain * (module.bias.double() - mean) + mean0)
                else:
                    module.bias.add_(averages[0].to(module.bias.dtype))


def gain_to(variance: Tensor, wanted: Tensor) -> Tensor:
    """By what a channel is to be multiplied; 1 where it is constant in either model."""
    gain = (wanted / variance.clamp_min(FLOOR)).sqrt().clamp(1 / MOST, MOST)
    return torch.where((variance > FLOOR) & (wanted > FLOOR), gain, torch.ones_like(gain))


def _channel_first(module: nn.Module) -> bool:
    return "Conv" in type(module).__name__


def channel_rows(module: nn.Module, output: Tensor) -> Tensor:
    if _channel_first(module) and output.ndim > 2:
        return output.movedim(1, -1).flatten(0, -2)
    return output.reshape(-1, output.shape[-1])


def divergence(outputs: list[Tensor], references: list[Tensor]) -> float:
    """KL(softmax y₀ ‖ softmax y), the mean over examples, of outputs [n, classes]; of others ‖y − y₀‖² / ‖y₀‖².

    outputs, references: of a model and of the original, batch by batch. Natural logarithm.
    """
    pairs = list(zip(outputs, references, strict=True))
    if all(y0.ndim == 2 and y0.shape[1] > 1 for _, y0 in pairs):
        mean = sum(_kl(y, y0) for y, y0 in pairs) / sum(len(y0) for _, y0 in pairs)
        return 0.0 if mean < 0 else mean  # rounding leaves -1e-17 of equal outputs; NaN stays
    return relative_error(outputs, references)


def relative_error(outputs: list[Tensor], references: list[Tensor]) -> float:
    """‖y − y₀‖² / ‖y₀‖² over all batches; ‖y‖² where the references are zero."""
    pairs = list(zip(outputs, references, strict=True))
    scale = sum(_squared_distance(y0) for _, y0 in pairs)
    return sum(_squared_distance(y, y0) for y, y0 in pairs) / (scale if scale > 0 else 1.0)


def _kl(output: Tensor, reference: Tensor) -> float:
    """Σ KL(softmax y₀ ‖ softmax y) over the rows of [n, classes], in double precision."""
    rows = max(1, PIECE // output.shape[1])
    total = 0.0
    for y, y0 in zip(output.split(rows), reference.split(rows), strict=True):
        log_q, log_p = y.double().log_softmax(1), y0.double().log_softmax(1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def _squared_distance(y: Tensor, y0: Tensor | None = None) -> float:
    """‖y − y₀‖², or ‖y‖², in double precision."""
    pieces = y.reshape(-1).split(PIECE)
    if y0 is None:
        return sum(float(part.double().square().sum()) for part in pieces)
    pairs = zip(pieces, y0.reshape(-1).split(PIECE), strict=True)
    return sum(float((part.double() - other.double()).square().sum()) for part, other in pairs)
