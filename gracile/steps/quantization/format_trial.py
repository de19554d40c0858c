"""Layers of a copy put into formats one by one, to see what that does to the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Batch, Data
from gracile.errors import DataError
from gracile.formats import Scheme
from gracile.graph import Trace
from gracile.nn import QuantizedLayer
from gracile.solvers import RoundingSolver
from gracile.stats.match import relative_error
from gracile.stats.match_layer import match_layer, output_moments
from gracile.stats.moments import CannotRefitError, LayerMoments
from gracile.stats.replay import Replay
from gracile.steps.correct import copy_model
from gracile.steps.pruning.blocks import put_module
from gracile.steps.pruning.sequence import called_once, targets_of
from gracile.steps.pruning.tables import at_least, outputs_of, some_batches
from gracile.steps.quantization.prepared import option_title
from gracile.steps.quantization.quantize_layers import Encoder
from gracile.steps.quantization.quantize_recurrent import build_nearest
from gracile.steps.quantization.round_layers import round_one, solvable

#: Calibration examples that formats are judged on, none of which a solver sees meanwhile.
EXAMPLES = 256

#: Layers of the trial that take one format, and the state of the batch norm behind the one, which takes up what a layer
#: without a bias cannot.
Held = tuple[list[nn.Module], dict[str, Any] | None]


class FormatTrial:
    """A copy of the model whose layers take formats, each rounded and corrected as it stands there.

    A layer is put into a format by a draft of the solver where there is one, on the inputs that it gets by then, and
    its bias and scales are matched to the float layer's output if the step corrects. Layers are put in the order of the
    forward. Of the trial's outputs counts ‖y − y₀‖² / ‖y₀‖² against the model's, of scores of classes less their mean.
    Their KL, small and decided by few examples where a net knows the calibration data by heart, chooses formats that
    suit these.

    order: names of the layers, in the order in which the model calls them, of layers that hold one weight that of the
    first. model: stays as it is, in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        units: Mapping[str, Sequence[str]],
        encoder: Encoder,
        solver: RoundingSolver | None,
        context: Context,
        correct: bool,
    ) -> None:
        """units: layer -> it and those that hold its weight too, which take one format, in the order of the model."""
        place = {layer.name: i for i, layer in enumerate(traced.layers)}
        self.order = sorted(units, key=lambda name: min(place.get(each, len(place)) for each in units[name]))
        self.units = units
        self.encoder, self.solver = encoder, solver.draft() if solver is not None else None
        self.model = copy_model(model).eval()
        fitted, self.batches = split(context.data, solver)
        self.data = context.data
        self._expected = [_centred(y) for y in outputs_of(self.model, context.data, self.batches)]
        self._first = {name: min(units[name], key=lambda each: place.get(each, len(place))) for name in units}
        self._floats = {each: self.model.get_submodule(each) for name in units for each in units[name]}
        solved = solvable(model, traced, self.order) if solver is not None else {}
        self._solved = [name for name in self.order if solved.get(name, "") is None]
        norms = dict(traced.batch_norm_pairs())
        plain = [name for name in self._solved if not isinstance(self._floats[name], nn.RNNBase)]
        self._moments = LayerMoments(self.model, targets_of(model, traced, plain, context, fitted), norms=norms)
        self._norm_states = {name: self.held(name)[1] for name in self.order}
        self._replay = Replay(self.model, context.data, self.batches)
        runs = [lambda net, batch=batch: context.data.forward(net, batch) for batch in self.batches]
        matched = set(called_once(model, traced)) & set(self.order) if correct else set()
        matched = {name for name in matched if not isinstance(self._floats[name], nn.RNNBase)}
        self._wanted = output_moments(self.model, matched, runs)

    def loss(self, name: str, scheme: Scheme | None) -> float:
        """The error of the outputs with the layer in this scheme, in which it stays; None: in floating point.

        Raises DataError where they are NaN or infinite.
        """
        self.put(name, scheme)
        found = self.error()
        if not math.isfinite(found):
            raise DataError(f"Quantize: the outputs are NaN or infinite with '{name}' in {option_title(scheme)}.")
        return found

    def put(self, name: str, scheme: Scheme | None) -> None:
        """Give the layer this format, and those that hold its weight too; None: their float weight."""
        if scheme is None:
            self.put_back(name, ([self._floats[each] for each in self.units[name]], self._norm_states.get(name)))
            self._replay.seek(self._first[name])
            return
        layers = [build_nearest(each, self._floats[each], scheme, self.encoder).eval() for each in self.units[name]]
        for each, layer in zip(self.units[name], layers, strict=True):
            if isinstance(layer, QuantizedLayer) and isinstance(layers[0], QuantizedLayer) and layer is not layers[0]:
                layer.hold_weight_of(layers[0])
            put_module(self.model, each, layer)
        if self.solver is not None and name in self._solved:
            self._round(name, self.solver)
        self._replay.seek(self._first[name])
        if name in self._wanted:
            runs = [lambda _net, i=i: self._replay.run(i) for i in range(len(self.batches))]
            present = output_moments(self.model, [name], runs, stop=True)
            if name in present:
                match_layer(self.model.get_submodule(name), present[name], self._wanted[name])

    def error(self) -> float:
        """Of the outputs now, all layers before the one put last being as they were then."""
        return relative_error([_centred(y) for y in self._replay.outputs()], self._expected)

    def held(self, name: str) -> Held:
        """The layer as it is now, for `put_back`."""
        norm = self._moments.norms.get(name)
        state = None if norm is None else self.model.get_submodule(norm).state_dict()
        return [self.model.get_submodule(each) for each in self.units[name]], state and {
            key: value.clone() for key, value in state.items()
        }

    def put_back(self, name: str, held: Held) -> None:
        """Give the place of the layer back to what `held` gave."""
        layers, state = held
        for each, layer in zip(self.units[name], layers, strict=True):
            put_module(self.model, each, layer)
        if state is not None:
            self.model.get_submodule(self._moments.norms[name]).load_state_dict(state)

    def _round(self, name: str, solver: RoundingSolver) -> None:
        old = self._floats[name]
        weight = None if isinstance(old, nn.RNNBase) else self.encoder.weight(name, old)
        try:
            round_one(self._moments, name, weight, solver, self.encoder.ranges)
        except CannotRefitError:
            self._solved.remove(name)


def split(data: Data, solver: RoundingSolver | None) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches to round on, and others to judge formats on: up to every second one, where there are two.

    The fewer bits, the more a solver suits them to what it saw; judged on that, too few bits are chosen.
    """
    batches = list(data.calibration_batches)
    if solver is None or len(batches) < 2:
        return batches, some_batches(data, EXAMPLES)
    judged = at_least(batches[::2], EXAMPLES)
    return [*batches[1::2], *batches[::2][len(judged) :]], judged


def _centred(outputs: Tensor) -> Tensor:
    """Scores of classes [n, classes] less their mean, which softmax does not see; other outputs as they are."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.ndim == 2 and outputs.shape[1] > 1 else outputs
