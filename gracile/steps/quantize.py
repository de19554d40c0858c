"""Quantize: encode weights, and put layer inputs on an integer grid, as scheme × ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.equalize import SmoothQuant
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.formats import Format, Int, PerChannel, Scheme, format_to_config
from gracile.graph import Trace, trace
from gracile.layer_stats import LayerStats
from gracile.nn import QuantizedLayer, quantize_layer, quantized_kind
from gracile.ranges import MSE, MinMax, Percentile
from gracile.recipe import Recorder, Step
from gracile.report.model import LayerRow, StepRecord
from gracile.select import Select, check_exclude
from gracile.solvers import RoundingSolver
from gracile.stats.collect import collect_activations, first_batch
from gracile.stats.rows import CONVOLUTIONS
from gracile.steps.correct import copy_model, correct_statistics
from gracile.steps.fold import fold_batch_norms
from gracile.steps.round_layers import round_in_sequence
from gracile.steps.smooth import smooth
from gracile.surgery import Swap, apply

#: Operators between a convolution and the next quantized layer that integer kernels take into the convolution.
ABSORBED = frozenset({"relu", "hardtanh", "clamp", "relu6"})


@dataclass(frozen=True)
class Quantize(Step):
    """Write weights in a number format and, where the scheme says so, measure and fix the grid of layer inputs.

    scheme: W8A8, W4A8, W4A16(group), ... (`gracile.formats`), or a Format for weights alone: Int(bits=4),
        FixedPoint(factor=256).
    solver: chooses the codes of linear layers and convolutions by what rounding does to their outputs, in the order of
        the forward: solvers.GPTQ(). Needs calibration data. None: every weight goes to the nearest code.
    ranges: how scales are found from weights and from what calibration saw: MinMax(), Percentile(), MSE().
    equalize: SmoothQuant() moves outliers of a linear layer's input channels into its weight, where that lowers the
        layer's output error; needs a scheme with an input format. None: nothing is moved.
    correct: bias correction afterwards, by the difference to the float model on the calibration batches; kept only if
        the output error on held-out batches falls.
    exclude: name patterns of layers that stay as they are.

    With an input format, a batch norm behind a convolution is folded into it first, as integer kernels need it.
    """

    scheme: Scheme | Format
    _: KW_ONLY
    solver: RoundingSolver | None = None
    ranges: MinMax | Percentile | MSE = MSE()
    equalize: SmoothQuant | None = None
    correct: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, (Scheme, Format)):
            hint = " W4A16 takes its group: W4A16(group=128)." if callable(self.scheme) else ""
            raise ConfigError(
                f"Quantize({self.scheme!r}): not a scheme or a format.{hint}\n"
                f"  Use W8A8, W8A16, W4A16(group=32) or Int(bits=4)."
            )
        if not isinstance(self.ranges, (MinMax, Percentile, MSE)):
            raise ConfigError(f"Quantize(ranges={self.ranges!r}): expected MinMax(), Percentile() or MSE().")
        if self.equalize is not None and not isinstance(self.equalize, SmoothQuant):
            raise ConfigError(f"Quantize(equalize={self.equalize!r}): expected equalize.SmoothQuant() or None.")
        if self.equalize is not None and self._scheme.input is None:
            raise ConfigError(
                f"Quantize({self._scheme.name}, equalize=SmoothQuant()): this scheme leaves inputs as they are, so "
                f"there is nothing to smooth.\n  Leave equalize out, or use W8A8."
            )
        if self.solver is not None and not isinstance(self.solver, RoundingSolver):
            raise ConfigError(f"Quantize(solver={self.solver!r}): expected a rounding solver, solvers.GPTQ(), or None.")
        check_exclude("Quantize", self.exclude)

    @property
    def _scheme(self) -> Scheme:
        return self.scheme if isinstance(self.scheme, Scheme) else Scheme(_format_name(self.scheme), self.scheme)

    @property
    def title(self) -> str:
        return f"Quantize to {self._scheme.name}"

    def check(self, model: nn.Module, context: Context) -> None:
        if self._scheme.input is not None and not context.data.has_calibration:
            raise DataError(
                f"Quantize({self._scheme.name}) measures the ranges of layer inputs and has no data.\n"
                f"  Pass Data(calibration=batches); labels are not needed. Without data, use W8A16 or W4A16."
            )
        if (self.solver is not None or self._scheme.ends is not None) and not context.data.has_calibration:
            what = "the first and last layer" if self.solver is None else f"what {type(self.solver).__name__} needs"
            raise DataError(
                f"Quantize({self._scheme.name}): {what} shows when the model runs, and there is no data.\n"
                f"  Pass Data(calibration=batches); labels are not needed."
            )

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self.check(model, context)
        recorder = Recorder(self)
        scheme = self._scheme
        layers = self._select(model, context, recorder)
        schemes = self._schemes(model, layers, context)
        encoded = {n: self._encode(n, model.get_submodule(n), schemes[n]) for n in layers}  # refuses before any change
        if scheme.input is not None:
            self._fold(model, layers, context, recorder)
        # Folded too, since its layers' outputs are what biases are corrected to.
        compares = (self.correct or self.solver is not None) and context.data.has_calibration
        reference = copy_model(model) if compares else None
        stats: Mapping[str, LayerStats] = {}
        outputs: set[str] = set()
        scales: dict[str, Tensor] = {}
        if scheme.input is not None:
            if self.equalize is not None:
                scales = smooth(model, layers, self.equalize, self._scheme, self.ranges, context, recorder)
            stats, outputs = self._measure(model, layers, scales, context)
            encoded = {
                name: self._encode(name, model.get_submodule(name), schemes[name], scales.get(name))
                for name in layers
                if name in stats
            }
        for name in layers:
            if scheme.input is not None and name not in stats:
                recorder.skip(name, type(model.get_submodule(name)).__name__, "never called on the calibration batches")
                continue
            needs = name in outputs
            self._swap(model, name, schemes[name], encoded[name], stats.get(name), needs, scales.get(name), recorder)
        changed = [row for row in recorder.layers if row.action == "quantized"]
        if not changed:
            raise NothingChangedError("Quantize: no layer was quantized.\n  The report's skipped rows say why.")
        if reference is not None and self.solver is not None:
            self._round(model, reference, [row.name for row in changed], scales, context, recorder)
        if reference is not None and self.correct:
            correct_statistics(model, reference, context, recorder, {})
        return recorder.record()

    def _schemes(self, model: nn.Module, layers: list[str], context: Context) -> dict[str, Scheme]:
        """The scheme of each layer."""
        schemes = dict.fromkeys(layers, self._scheme)
        if self._scheme.ends is not None:
            weighted = {n for n, m in model.named_modules() if isinstance(m, QuantizedLayer) or quantized_kind(m)}
            called = [layer.name for layer in _traced(model, context).layers if layer.name in weighted]
            schemes |= {name: self._scheme.ends for name in (*called[:1], *called[-1:]) if name in schemes}
        return schemes

    def _round(
        self,
        model: nn.Module,
        reference: nn.Module,
        layers: list[str],
        smoothed: Mapping[str, Tensor],
        context: Context,
        recorder: Recorder,
    ) -> None:
        """Replace the nearest codes by the solver's."""
        assert self.solver is not None
        weights: dict[str, Tensor] = {name: reference.get_submodule(name).weight for name in layers}  # type: ignore[misc]
        weights |= {name: weights[name] * scale for name, scale in smoothed.items() if name in weights}
        traced = _traced(reference, context)
        done = round_in_sequence(model, reference, traced, weights, self.solver, self.ranges, context)
        title = type(self.solver).__name__
        recorder.numbers["output_error_nearest"] = done.nearest_error
        recorder.notes.append(
            f"{title} {'rounded' if done.kept else 'was taken back on'} {len(done.gains)} layers: output error on "
            f"held-out batches {done.error:.3g} with it, {done.nearest_error:.3g} by rounding to nearest."
        )
        for i, row in enumerate(recorder.layers):
            if row.name in done.skipped and row.action == "quantized":
                recorder.layers[i] = replace(row, reason=f"rounded to nearest: {done.skipped[row.name]}")
            elif done.kept and row.name in done.gains and row.action == "quantized":
                reason = f"{title}: {done.gains[row.name]:.3g} of the output error of rounding to nearest"
                recorder.layers[i] = replace(row, error=done.errors[row.name], reason=reason)

    def _select(self, model: nn.Module, context: Context, recorder: Recorder) -> list[str]:
        select = (context.select or Select()).without(*self.exclude)
        weighted = [
            (name, m)
            for name, m in model.named_modules()
            if isinstance(m, QuantizedLayer) or any(p.ndim >= 2 for p in m.parameters(recurse=False))
        ]
        Select(exclude=self.exclude).check([name for name, _ in weighted])
        shared = _shared_weights(model)
        chosen = []
        for name, module in weighted:
            if not select.matches(name):
                continue
            if isinstance(module, QuantizedLayer):
                recorder.skip(name, type(module).__name__, "quantized already")
            elif quantized_kind(module) is None:
                recorder.skip(name, type(module).__name__, f"no quantized layer stands for a {type(module).__name__}")
            elif not name:
                recorder.skip(
                    "model", type(module).__name__, "the model is itself a layer; wrap it: nn.Sequential(model)"
                )
            elif name in shared:
                recorder.skip(name, type(module).__name__, f"shares its weight with '{shared[name]}'")
            else:
                chosen.append(name)
        if not chosen:
            reasons = [f"{row.name}: {row.reason}" for row in recorder.layers[:5]]
            raise NothingChangedError(
                "Quantize: no layer can be quantized.\n  " + ("\n  ".join(reasons) or "The selection holds none.")
            )
        return chosen

    def _fold(self, model: nn.Module, layers: list[str], context: Context, recorder: Recorder) -> None:
        for pair in fold_batch_norms(model, _traced(model, context).batch_norm_pairs(), set(layers)):
            recorder.edits.append(Swap(pair[1], "Identity"))
            recorder.layers.append(LayerRow(name=pair[1], kind="BatchNorm", action="folded", reason=f"into {pair[0]}"))

    def _measure(
        self, model: nn.Module, layers: list[str], scales: Mapping[str, Tensor], context: Context
    ) -> tuple[dict[str, LayerStats], set[str]]:
        """The histograms of inputs and outputs, and the layers whose output needs a grid too."""
        traced = _traced(model, context)
        outputs = {name for name in layers if _needs_output_grid(model.get_submodule(name), traced.consumers(name))}
        stats = collect_activations(
            model,
            layers,
            {"input", "output"},
            context.data,
            divisors=scales,
            on_batch=lambda n: context.progress("calibrate", n, None),
        )
        return stats, outputs

    def _encode(self, name: str, layer: nn.Module, scheme: Scheme, scale: Tensor | None = None) -> dict[str, Tensor]:
        weight: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr,assignment]
        weight = weight if scale is None else weight * scale
        if not torch.isfinite(weight).all():
            raise DataError(f"Quantize: the weight of layer '{name}' holds NaN or infinity.")
        fmt = _format_for(layer, scheme.weight)
        try:
            if isinstance(fmt, Int):
                return fmt.encode(weight, self.ranges.weight(weight, fmt))
            return fmt.encode(weight)
        except ConfigError as error:
            raise ConfigError(f"Quantize: layer '{name}' {tuple(weight.shape)}: {error}") from error

    def _swap(
        self,
        model: nn.Module,
        name: str,
        scheme: Scheme,
        encoded: dict[str, Tensor],
        stats: LayerStats | None,
        needs_output: bool,
        smoothing: Tensor | None,
        recorder: Recorder,
    ) -> None:
        old: Any = model.get_submodule(name)
        fmt = _format_for(old, scheme.weight)
        config: dict[str, Any] = {"weight": format_to_config(fmt), "input": None, "output": None}
        tensors = {f"weight_{key}": value for key, value in encoded.items() if key != "shape"}
        if stats is not None and isinstance(scheme.input, Int):
            sides = {"input": stats.input, "output": stats.output if needs_output else None}
            for side, histogram in sides.items():
                if histogram is not None:
                    scale, zero_point = self.ranges.activation(histogram, scheme.input)
                    config[side] = format_to_config(scheme.input)
                    tensors[f"{side}_scale"], tensors[f"{side}_zero_point"] = scale, zero_point
        if smoothing is not None:
            config["smooth"] = True
            tensors["input_multiplier"] = 1 / smoothing
        if isinstance(getattr(old, "bias", None), Tensor):
            config["bias"] = True
            tensors["bias"] = old.bias.detach()
        layer = quantize_layer(old, tensors, config)
        edit = Swap(name, type(layer).__name__, config)
        apply(model, [edit])
        new: Any = model.get_submodule(name)
        new.load_state_dict(layer.state_dict())
        new.train(old.training)
        recorder.edits.append(edit)
        weight = old.weight.detach().float()
        weight = weight if smoothing is None else weight * smoothing
        error = (fmt.decode(encoded) - weight).square().sum() / weight.square().sum().clamp_min(1e-30)
        recorder.layers.append(
            LayerRow(
                name=name,
                kind=type(old).__name__,
                action="quantized",
                bits=8 * sum(t.nbytes for key, t in encoded.items() if key != "shape") / old.weight.numel(),
                sparsity=float((new.decoded_weight() == 0).float().mean()),
                error=float(error),
            )
        )


def _traced(model: nn.Module, context: Context) -> Trace:
    batch = first_batch(context.data)
    return trace(model, lambda net: context.data.forward(net, batch))


def _format_for(layer: nn.Module, fmt: Format) -> Format:
    """The scheme's format, with channels along the output axis of a transposed convolution."""
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    if transposed and isinstance(fmt, Int) and fmt.granularity == PerChannel(0):
        return replace(fmt, granularity=PerChannel(1))
    return fmt


def _format_name(fmt: Format) -> str:
    return f"{type(fmt).__name__}({', '.join(f'{k}={v}' for k, v in list(vars(fmt).items())[:1])})"


def _needs_output_grid(layer: nn.Module, consumers: tuple[str, ...]) -> bool:
    """Whether an integer kernel needs the output on a grid of its own, since no quantized layer follows directly.

    Linear layers need none: their kernels give float outputs from integer products.
    """
    if isinstance(layer, CONVOLUTIONS):
        return not all(c in ABSORBED or c.startswith("module:") for c in consumers)
    return False


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Layer -> another layer that holds the very same weight."""
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if id(weight) in owners:
            shared[name] = owners[id(weight)]
            shared[owners[id(weight)]] = name
        owners.setdefault(id(weight), name)
    return shared
