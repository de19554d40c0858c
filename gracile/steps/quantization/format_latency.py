"""What formats of layers take on the runtime that serves the model, and choices timed there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import nn

from gracile.context import Context
from gracile.errors import ConfigError
from gracile.files import sha256_json
from gracile.formats import Scheme
from gracile.goal import Latency
from gracile.graph import Trace
from gracile.knapsack import choose_options
from gracile.recipe import Recorder
from gracile.steps.correct import copy_model
from gracile.steps.latency.search import search_within
from gracile.steps.latency.table import EACH
from gracile.steps.latency.timing import CAREFUL, Timer
from gracile.steps.pruning.blocks import put_module
from gracile.steps.quantization.prepared import option_title
from gracile.steps.quantization.quantize_layers import Encoder, with_output_grids
from gracile.steps.quantization.quantize_recurrent import build_nearest

#: An option of each unit, by its first layer.
Choice = Mapping[str, int]


class FormatLatency:
    """Times models whose layers are in formats beside the float one, and predicts what others would take.

    A layer in integers between two in floating point pays for going there and back, so that nothing is measured of one
    alone. The model is timed with all layers in each option, and with all in the fastest of these but for layers of one
    kind, which are in another; what they cost so is scaled until that of all layers adds up to what was timed.

    options: of each unit, by its first layer, all of one length; None is to stay in floating point. saved: unit -> what
    each option saves beside the slowest one, as a share of the float model's latency.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        units: Mapping[str, Sequence[str]],
        options: Mapping[str, Sequence[Scheme | None]],
        encoder: Encoder,
        timer: Timer,
        context: Context,
        recorder: Recorder,
    ) -> None:
        self.model, self.traced, self.units, self.options = model, traced, units, options
        self.encoder, self.timer = encoder, timer
        self._built: dict[tuple[str, int, bool], nn.Module] = {}
        self._measured: dict[tuple[tuple[str, int], ...], float] = {}
        self.timed = 0
        start = time.perf_counter()
        count = len(next(iter(options.values())))
        uniform = [self._time(dict.fromkeys(options, i), EACH) for i in range(count)]
        self.fastest = min(range(count), key=uniform.__getitem__)
        self.least = uniform[self.fastest]
        costs = self._costs(uniform, context)
        most = {name: max(row) for name, row in costs.items()}
        self.saved = {name: [most[name] - cost for cost in row] for name, row in costs.items()}
        self._most = self.least + sum(most.values())
        shares = ", ".join(
            f"{option_title(scheme)} {share:.3f}"
            for scheme, share in zip(next(iter(options.values())), uniform, strict=True)
        )
        recorder.notes.append(
            f"Latency on {timer.target.name} with all layers in one option, of the float model's: {shares}; "
            f"{self.timed} models timed in {time.perf_counter() - start:.0f} s."
        )

    def meet(self, budget: Latency, losses: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """The options of least loss within the budget, as measured. Raises ConfigError naming the nearest latency."""

        def least(wanted: float) -> dict[str, int]:
            items = [list(zip(losses[name], row, strict=True)) for name, row in self.saved.items()]
            return dict(zip(self.saved, choose_options(items, wanted - (1 - self._most)), strict=True))

        found = search_within(self._limit(budget), least, lambda choice: 1 - self.predict(choice), self.measure)
        if found.choice is None:
            raise self._beyond(budget, min(found.nearest, self.least))
        return found.choice

    def check(self, budget: Latency) -> None:
        """Raise the error of `meet` where it is clear before any loss is measured, or the model fits as it is."""
        whole_ms, limit = self.timer.whole_ms, self._limit(budget)
        if limit >= 1:
            raise ConfigError(f"Quantize(to={budget}): the model is within this budget already ({whole_ms:.3g} ms).")
        if self.least - 2 * self.timer.error > limit:
            raise self._beyond(budget, self.least)

    def within(self, budget: Latency, choice: Choice) -> bool:
        """Whether the choice was measured within the budget."""
        return self.measure(choice) <= self._limit(budget)

    def predict(self, choice: Choice) -> float:
        """Latency as a share of the float model's, by the sum of what single layers cost."""
        return self._most - sum(self.saved[name][i] for name, i in choice.items())

    def measure(self, choice: Choice) -> float:
        """Latency with these options, as a share of the float model's; the same options are timed once."""
        key = tuple(sorted(choice.items()))
        if key not in self._measured:
            self._measured[key] = self._time(choice, CAREFUL)
        return self._measured[key]

    def _limit(self, budget: Latency) -> float:
        """The budget as a share of the float model's latency."""
        return budget.limit(self.timer.whole_ms) / self.timer.whole_ms

    def _beyond(self, budget: Latency, nearest: float) -> ConfigError:
        whole_ms = self.timer.whole_ms
        return ConfigError(
            f"Quantize(to={budget}): cannot be met; the nearest that these options reach is "
            f"{nearest * whole_ms:.3g} ms of {whole_ms:.3g} ms ({nearest:.3f}).\n"
            f"  Ask for at least that, or add an option that {self.timer.target.name} runs faster."
        )

    def _costs(self, uniform: Sequence[float], context: Context) -> dict[str, list[float]]:
        """Unit -> what each option costs over the fastest one, as a share of the float model's latency."""
        costs = {name: [0.0] * len(uniform) for name in self.options}
        alike: dict[str, list[str]] = {}
        for name in self.options:
            alike.setdefault(self._kind(name), []).append(name)
        for done, names in enumerate(alike.values()):
            for i in (i for i in range(len(uniform)) if i != self.fastest):
                changed = self._time(dict.fromkeys(self.options, self.fastest) | dict.fromkeys(names, i), EACH)
                for name in names:
                    costs[name][i] = max(0.0, changed - self.least) / len(names)
            context.progress("latency of formats", done + 1, len(alike))
        for i, share in enumerate(uniform):
            together = sum(row[i] for row in costs.values())
            for row in costs.values():
                row[i] *= (share - self.least) / together if together > 0 else 0.0
        return costs

    def _time(self, choice: Choice, seconds: float) -> float:
        self.timed += 1
        floats = all(self.options[name][i] is None for name, i in choice.items())
        return 1.0 if floats else self.timer.relative(self._model(choice), seconds=seconds)

    def _kind(self, name: str) -> str:
        """Equal for units of which formats change the work alike."""
        infos = [layer for layer in self.traced.layers if layer.name in self.units[name]]
        if len(infos) != len(self.units[name]):
            return name
        shapes = [[info.kind, list(info.input_shape), list(info.output_shape), info.calls] for info in infos]
        return sha256_json([[self.model.get_submodule(each).extra_repr() for each in self.units[name]], shapes])

    def _model(self, choice: Choice) -> nn.Module:
        """A copy of the model with its layers in these options, rounded to nearest."""
        schemes = {each: self.options[name][i] for name, i in choice.items() for each in self.units[name]}
        encoder = with_output_grids(self.encoder, self.model, schemes, self.traced)
        copy = copy_model(self.model).eval()
        for name, i in choice.items():
            for each in self.units[name]:
                scheme = schemes[each]
                if scheme is not None:
                    put_module(copy, each, self._layer(each, i, scheme, encoder))
        return copy

    def _layer(self, name: str, option: int, scheme: Scheme, encoder: Encoder) -> nn.Module:
        key = (name, option, name in encoder.outputs)
        if key not in self._built:
            self._built[key] = build_nearest(name, self.model.get_submodule(name), scheme, encoder).eval()
        return self._built[key]
