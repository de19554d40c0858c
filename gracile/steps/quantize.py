"""Quantize: encode weights, and put layer inputs on an integer grid, as scheme × ranges."""

from __future__ import annotations

import logging
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from torch import Tensor, nn

from gracile.context import Context
from gracile.equalize import AWQ, CrossLayer, InputScales, SmoothQuant
from gracile.errors import DataError, NothingChangedError
from gracile.formats import Format, Scheme, is_dynamic
from gracile.goal import Bytes, Latency
from gracile.graph import Trace, trace
from gracile.nn import QuantizedLayer, quantized_kind
from gracile.ranges import MSE, Automatic, Range
from gracile.recipe import Recorder, Step
from gracile.report.model import LayerRow, StepRecord
from gracile.sharing import own_parameters, share_parameters, tied_groups
from gracile.solvers import BlockSolver, RoundingSolver
from gracile.stats.collect import collect_activations, first_batch
from gracile.steps.correct import correct_statistics
from gracile.steps.latency.budget import record_latency
from gracile.steps.latency.timing import Timer, target_of, timer_for
from gracile.steps.quantization.choose_ranges import choose_ranges, describe_ranges
from gracile.steps.quantization.equalize_layers import equalize_where_better
from gracile.steps.quantization.fold import fold_batch_norms
from gracile.steps.quantization.mixed_precision import choose_schemes, measure_losses
from gracile.steps.quantization.prepared import Prepared, option_title
from gracile.steps.quantization.quantize_layers import Encoder, layers_with_output_grids, quantizable, with_output_grids
from gracile.steps.quantization.quantize_recurrent import check_recurrent, quantize_recurrent
from gracile.steps.quantization.reconstruct_blocks import reconstruct_blocks, record_reconstruction
from gracile.steps.quantization.round_layers import record_rounding, round_in_sequence
from gracile.steps.quantization.settings import check_settings
from gracile.steps.quantization.smooth import smooth
from gracile.steps.quantization.storage import stored_only
from gracile.steps.quantization.tied import tie
from gracile.surgery import Swap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantize(Step):
    """Write weights in a number format and, where the scheme says so, measure and fix the grid of layer inputs.

    scheme: W8A8, W4A8, W4A16(group), ... (`gracile.formats`), or a Format for weights alone: Int(bits=4),
        FixedPoint(factor=256). None: each layer takes one of the options.
    to, options: at most so many bytes of the model as stored, Bytes(0.15), or so much of its latency on a target,
        Latency(0.6), and the schemes or formats to choose from for each layer: those by which the outputs change least,
        measured one layer at a time. An option None leaves a layer in floating point. Needs calibration data.
    solver: chooses the codes of linear layers and convolutions by what rounding does to their outputs, in the order of
        the forward: solvers.GPTQ(), or AdaRound() or SignRound(), which go on from there block by block. Needs
        calibration data. None: every weight goes to the nearest code.
    ranges: how scales are found from weights and from what calibration saw: MinMax(), Percentile(), Entropy(),
        MovingAverage(), MSE(), or Automatic() for the best of several for each layer.
    equalize: SmoothQuant() moves outliers of a linear layer's input channels into its weight, where that lowers the
        layer's output error; needs a scheme with an input format. AWQ() scales weights that read large inputs up, in
        schemes without one. CrossLayer() shares scales out between layers that follow each other, where that lowers the
        output error on held-out batches. None: nothing is moved.
    correct: bias correction afterwards, by the difference to the float model on the calibration batches; kept only if
        the output error on held-out batches falls.
    exclude: name patterns of layers that stay as they are.

    With an input format, a batch norm behind a convolution is folded into it first, as integer kernels need it; what
    such a layer gives a sum or the like takes 8 bits, since no kernel adds in fewer. LSTMs, GRUs and RNNs take the
    scheme's weight format and compute in floating point; with W8A8Dynamic, LSTMs round inputs and states as they come.
    Linear layers and embeddings that hold one weight take one format and go on holding one, of nearest codes; all of
    them are quantized, or none.
    """

    scheme: Scheme | Format | None = None
    _: KW_ONLY
    to: Bytes | Latency | None = None
    options: tuple[Scheme | Format | None, ...] = ()
    solver: RoundingSolver | None = None
    ranges: Range = MSE()
    equalize: SmoothQuant | AWQ | CrossLayer | None = None
    correct: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes to choose from: one, or those that were given, without the one to stay in floating point."""
        given = [each for each in self.options if each is not None] if self.scheme is None else [self.scheme]
        return tuple(each if isinstance(each, Scheme) else Scheme(_format_name(each), each) for each in given)

    @property
    def _measures_inputs(self) -> bool:
        """Whether ranges of inputs are found beforehand, and not when the model runs."""
        return any(scheme.input is not None and not is_dynamic(scheme.input) for scheme in self.schemes)

    @property
    def replaces_tensors(self) -> bool:
        return True

    @property
    def title(self) -> str:
        names = " or ".join(map(option_title, [*self.schemes, *([None] if None in self.options else [])]))
        return f"Quantize to {names}" + ("" if self.to is None else f" within {self.to}")

    def check(self, model: nn.Module, context: Context) -> None:
        stored = stored_only(self.schemes, self._target(context))
        if stored is not None:
            logger.warning("%s: %s", self.title, stored)
        self._check_data(context)

    def _target(self, context: Context) -> Any:
        """The runtime that is to run the model, or None where none was named; with a budget of latency there is one."""
        return target_of(self.to, context, "Quantize") if isinstance(self.to, Latency) else context.target

    def _check_data(self, context: Context) -> None:
        if context.data.has_calibration:
            return
        if self._measures_inputs and self.to is None and self.solver is None:
            raise DataError(
                f"Quantize({self.schemes[0].name}) measures the ranges of layer inputs and has no data.\n"
                f"  Pass Data(calibration=batches); labels are not needed. Without data, use W8A16 or W4A16."
            )
        reason = None
        if self.to is not None:
            reason = "chooses formats by what they do to the outputs"
        elif self.solver is not None:
            reason = f"rounds by what {type(self.solver).__name__} measures"
        elif self.equalize is not None:
            reason = "equalizes layers by what that does to the outputs"
        elif self.schemes[0].ends is not None:
            reason = "finds the first and the last layer by running the model"
        if reason is not None:
            raise DataError(
                f"{self.title}: it {reason}, and has no data.\n  Pass Data(calibration=batches); labels are not needed."
            )

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self._check_data(context)
        recorder = Recorder(self)
        recorder.notes += filter(None, [stored_only(self.schemes, self._target(context))])
        if not isinstance(self.to, Latency):
            return self._apply(model, context, recorder)
        with timer_for(self.to, model, context, first_batch(context.data), "Quantize") as timer:
            return self._apply(model, context, recorder, timer)

    def _apply(self, model: nn.Module, context: Context, recorder: Recorder, timer: Timer | None = None) -> StepRecord:
        ready = self._prepare(model, context, recorder)
        traced = ready.traced
        chosen: dict[str, Scheme | None] = {name: found[0] for name, found in ready.schemes.items()}
        if self.to is not None and traced is not None:
            chosen = choose_schemes(
                model,
                traced,
                ready.options,
                ready.units,
                self.to,
                ready.encoder,
                self.solver,
                context,
                recorder,
                timer,
                correct=self.correct,
            )
            ready = ready.without([name for name, scheme in chosen.items() if scheme is None], model, recorder)
            ready = replace(ready, encoder=with_output_grids(ready.encoder, model, chosen, traced))
        schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
        for name in ready.layers:
            ready.encoder.swap(model, name, schemes[name], recorder)
        tie(model, ready.tied, recorder)
        quantize_recurrent(model, {name: schemes[name] for name in ready.recurrent}, self.ranges, recorder)
        if ready.reference is not None:  # biases of other layers may be corrected
            own_parameters(model, ready.reference)
        if ready.reference is not None and traced is not None and self.solver is not None:
            self._round(model, ready, traced, context, recorder)
        if ready.reference is not None and self.correct:
            correct_statistics(model, ready.reference, context, recorder, {})
        if timer is not None:
            record_latency(model, timer, self.to, recorder)
        return recorder.record()

    def measure_losses(self, model: nn.Module, context: Context) -> dict[str, list[float]]:
        """Layer -> the error of the outputs with that layer alone in each of the schemes; for `to` and options.

        The model is prepared in place, folded that is, and otherwise left as it is.
        """
        self.check(model, context)
        ready = self._prepare(model, context, Recorder(self))
        assert ready.traced is not None, "a budget is needed to choose"
        return measure_losses(
            model, ready.traced, ready.options, ready.units, ready.encoder, self.solver, context, correct=self.correct
        )

    def _prepare(self, model: nn.Module, context: Context, recorder: Recorder) -> Prepared:
        """Fold, equalize and measure; all that comes before the first layer is quantized."""
        layers, recurrent = quantizable(model, self.exclude, context, recorder)
        check_recurrent(model, recurrent, [scheme.weight for scheme in self.schemes])
        tied = [group for group in tied_groups(model, "weight") if group[0] in layers]
        alone = [name for name in layers if not any(name in group for group in tied)]
        schemes = self._schemes(model, layers, tied, context)
        encoder = Encoder(self.ranges)
        for name in layers:  # refuses before any change
            for scheme in schemes[name]:
                encoder.check(name, model.get_submodule(name), scheme)
        folded = self._fold(model, alone, context, recorder) if self._measures_inputs else {}
        looks = self._measures_inputs or self.solver is not None or self.to is not None or self.equalize is not None
        traced = _traced(model, context) if looks else None
        if isinstance(self.equalize, CrossLayer) and traced is not None:
            plain = replace(self, equalize=None, solver=None, correct=False)
            equalize_where_better(model, alone, traced, self.equalize, plain, context, recorder)
        # Folded and equalized too, since its layers' outputs are what biases are corrected to.
        compares = self.correct or self.solver is not None
        reference = share_parameters(model) if compares and context.data.has_calibration else None
        if self._measures_inputs and traced is not None:
            smoothing = self._smooth(model, alone, context, recorder)
            encoder = replace(self._measure(model, layers, traced, smoothing, context), folded=folded)
            if isinstance(self.ranges, Automatic):
                chosen = choose_ranges(model, schemes, encoder.stats, smoothing, self.ranges, context.data)
                recorder.notes.append(describe_ranges(chosen))
                encoder = replace(encoder, chosen=chosen)
            for name in [name for name in layers if name not in encoder.stats]:
                recorder.skip(name, type(model.get_submodule(name)).__name__, "never called on the calibration batches")
                layers.remove(name)
        elif traced is not None:
            encoder = Encoder(self.ranges, smoothing=self._smooth(model, alone, context, recorder))
        if not layers and not recurrent:
            raise NothingChangedError("Quantize: no layer was quantized.\n  The report's skipped rows say why.")
        schemes = {name: schemes[name] for name in layers} | dict.fromkeys(recurrent, self.schemes)
        return Prepared(layers, recurrent, tied, schemes, encoder, traced, reference, None in self.options)

    def _schemes(
        self, model: nn.Module, layers: list[str], tied: list[list[str]], context: Context
    ) -> dict[str, tuple[Scheme, ...]]:
        """The scheme of each layer, or those there are to choose from."""
        schemes = dict.fromkeys(layers, self.schemes)
        ends = self.schemes[0].ends if self.to is None else None
        if ends is not None:
            weighted = {n for n, m in model.named_modules() if isinstance(m, QuantizedLayer) or quantized_kind(m)}
            called = [layer.name for layer in _traced(model, context).layers if layer.name in weighted]
            outer = {*called[:1], *called[-1:]}
            outer |= {name for group in tied if outer & set(group) for name in group}
            schemes |= {name: (ends,) for name in outer if name in schemes}
        return schemes

    def _round(self, model: nn.Module, ready: Prepared, traced: Trace, context: Context, recorder: Recorder) -> None:
        """Replace the nearest codes by the solver's."""
        reference = ready.reference
        assert reference is not None
        solver = self.solver.start if isinstance(self.solver, BlockSolver) else self.solver
        weights = {name: ready.encoder.weight(name, reference.get_submodule(name)) for name in ready.layers}
        if solver is not None:
            done = round_in_sequence(
                model, reference, traced, weights, solver, self.ranges, context, recurrent=ready.recurrent
            )
            record_rounding(done, type(solver).__name__, recorder)
        if isinstance(self.solver, BlockSolver):
            blocks = reconstruct_blocks(model, reference, traced, weights, self.solver, self.ranges, context)
            record_reconstruction(blocks, type(self.solver).__name__, model, recorder)

    def _fold(self, model: nn.Module, layers: list[str], context: Context, recorder: Recorder) -> dict[str, float]:
        """Fold batch norms into the layers before them; layer -> ε."""
        pairs = _traced(model, context).batch_norm_pairs()
        epsilons = {norm: float(model.get_submodule(norm).eps) for _, norm in pairs}  # type: ignore[arg-type]
        folded = fold_batch_norms(model, pairs, set(layers))
        for layer, norm in folded:
            recorder.edits.append(Swap(norm, "Identity"))
            recorder.layers.append(LayerRow(name=norm, kind="BatchNorm", action="folded", reason=f"into {layer}"))
        return {layer: epsilons[norm] for layer, norm in folded}

    def _smooth(self, model: nn.Module, layers: list[str], context: Context, recorder: Recorder) -> dict[str, Tensor]:
        """What divides the inputs of linear layers and multiplies their weights."""
        if not isinstance(self.equalize, InputScales):
            return {}
        return smooth(model, layers, self.equalize, self.schemes[0], self.ranges, context, recorder)

    def _measure(
        self, model: nn.Module, layers: list[str], traced: Trace, smoothing: dict[str, Tensor], context: Context
    ) -> Encoder:
        """The histograms of inputs, divided by what smooths them, and of outputs."""
        stats = collect_activations(
            model,
            layers,
            {"input", "output"},
            context.data,
            divisors=smoothing,
            on_batch=lambda n: context.progress("calibrate", n, None),
        )
        return Encoder(self.ranges, stats, layers_with_output_grids(model, layers, traced), smoothing)


def _traced(model: nn.Module, context: Context) -> Trace:
    batch = first_batch(context.data)
    return trace(model, lambda net: context.data.forward(net, batch))


def _format_name(fmt: Format) -> str:
    return f"{type(fmt).__name__}({', '.join(f'{k}={v}' for k, v in list(vars(fmt).items())[:1])})"
