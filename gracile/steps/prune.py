"""Prune: remove weights or whole units, as criterion × pattern × allocation × repair."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from gracile.allocate import GlobalRank, MeasuredLoss, Uniform
from gracile.context import Context
from gracile.criteria import Magnitude
from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.goal import Budget, Latency
from gracile.layer_stats import GATE_STATS, GRADIENT_STATS
from gracile.patterns import NM, Channels, Heads, Layers, Unstructured
from gracile.recipe import Recorder, Step
from gracile.report.model import StepRecord
from gracile.select import check_exclude
from gracile.solvers import LeastSquares
from gracile.steps.latency.timing import target_of
from gracile.steps.plan import plan_step
from gracile.steps.pruning.prune_jointly import prune_jointly
from gracile.steps.pruning.prune_layers import prune_layers
from gracile.steps.pruning.prune_units import prune_units
from gracile.steps.pruning.prune_weights import prune_weights


@dataclass(frozen=True)
class Prune(Step):
    """Remove the weights (or channels, neurons, heads) that a criterion scores lowest, or blocks that do least.

    fraction: share to remove, in (0, 1): of the weights for `Unstructured`, of the units for `Channels` and `Heads`, of
        the residual blocks for `Layers`.
    below: remove what scores less than this; with `Magnitude`, weights with |w| < below, or units whose producing
        weights have a norm below it.
    to: remove units until a budget is met: MACs, Parameters, Bytes or Latency, that of the first calibration batch
        on the target, measured in turn with the model as it was.
        Exactly one of `fraction`, `below` and `to` is given, or none with `NM(keep, of)`, whose amount is its name.
    criterion: (weight, stats) -> scores, or one of whole units (`UnitCriterion`); higher is kept.
    pattern: what is removed together. A tuple of `Channels` and `Heads`: units of each kind, to one amount; with
        `Layers` among them, blocks and units to one budget `to` (see `prune_jointly`, which says what that costs).
    allocation: how a total is shared out over layers. None: `GlobalRank()` for units, `Uniform()` for weights.
    repair: how the remaining weights make good a cut of units: solvers.LeastSquares(). Kept only if the output error
        on held-out calibration batches falls. Single weights are not repaired.
    correct: batch-norm and bias correction after the cut, by the difference to the model before it on the calibration
        batches; kept only if the output error on held-out batches falls.
    exclude: name patterns of layers left alone.
    examples: training examples behind criteria that need gradients.
    """

    fraction: float | None = None
    _: KW_ONLY
    below: float | None = None
    to: Budget | None = None
    criterion: Any = Magnitude()
    pattern: Any = Unstructured()
    allocation: Uniform | GlobalRank | MeasuredLoss | None = None
    repair: LeastSquares | None = None
    correct: bool = True
    exclude: tuple[str, ...] = ()
    examples: int = 256

    def __post_init__(self) -> None:
        given = [name for name in ("fraction", "below", "to") if getattr(self, name) is not None]
        wanted = 0 if isinstance(self.pattern, NM) else 1
        if len(given) != wanted:
            raise ConfigError(
                f"Prune: {' and '.join(given) or 'no amount'} given with {type(self.pattern).__name__}.\n"
                + ("  NM's amount is its name: give none." if wanted == 0 else "  Give one of fraction, below= or to=.")
            )
        if self.fraction is not None and not (_is_number(self.fraction) and 0 < self.fraction < 1):
            raise ConfigError(
                f"Prune({self.fraction!r}): the fraction to remove must be above 0 and below 1.\n"
                f"  Prune(0.3) removes 30 %."
            )
        if self.below is not None and not (_is_number(self.below) and 0 < self.below < float("inf")):
            raise ConfigError(f"Prune(below={self.below!r}): expected a positive number.")
        if self.to is not None and not isinstance(self.to, Budget):
            raise ConfigError(f"Prune(to={self.to!r}): expected a budget, for example MACs(0.5).")
        if self.to is not None and not self.cuts_units:
            raise ConfigError(
                f"Prune(to={self.to!r}): single weights do not change MACs or latency.\n"
                f"  Use pattern=Channels(), or a fraction: Prune(0.5)."
            )
        of_weights, of_units = callable(self.criterion), hasattr(self.criterion, "unit_scores")
        if isinstance(self.criterion, type) or not hasattr(self.criterion, "needs") or not (of_weights or of_units):
            raise ConfigError(f"Prune(criterion={self.criterion!r}): not a criterion; try Magnitude() or Taylor().")
        several = isinstance(self.pattern, tuple)
        known = (Channels, Heads, Layers) if several else (Unstructured, NM, Channels, Heads, Layers)
        if not self.patterns or not all(isinstance(pattern, known) for pattern in self.patterns):
            raise ConfigError(
                f"Prune(pattern={self.pattern!r}): not a pattern; try Unstructured() or Channels().\n"
                f"  Several at once are (Channels(), Heads(), Layers()); single weights are a step of their own."
            )
        depth = [pattern for pattern in self.patterns if isinstance(pattern, Layers)]
        if several and depth and (len(depth) > 1 or not self.kinds or self.to is None):
            raise ConfigError(
                f"Prune(pattern={self.pattern!r}): units and blocks have no common amount but a budget.\n"
                f"  Use pattern=(Channels(), Layers()) with to=MACs(0.5), or Layers() alone."
            )
        if not of_weights and not self.cuts_units:
            raise ConfigError(
                f"Prune(criterion={self.criterion!r}): it scores whole units, not single weights.\n"
                f"  Use it with pattern=Channels() or Heads()."
            )
        if isinstance(self.pattern, Layers) and (self.criterion != Magnitude() or self.allocation is not None):
            raise ConfigError(
                "Prune(pattern=Layers()): blocks are chosen by what leaving them out does to the outputs.\n"
                "  Give no criterion and no allocation."
            )
        measures = isinstance(self.allocation, MeasuredLoss)
        if measures and (not self.cuts_units or self.below is not None):
            raise ConfigError(
                "Prune(allocation=MeasuredLoss()): widths of groups of units are what it shares out.\n"
                "  Use it with pattern=Channels() or Heads(), and a fraction or to=."
            )
        if self.allocation is not None and not measures and not _is_function(self.allocation):
            raise ConfigError(
                f"Prune(allocation={self.allocation!r}): not an allocation; try allocate.Uniform() or "
                f"allocate.GlobalRank()."
            )
        if not (isinstance(self.examples, int) and self.examples >= 1):
            raise ConfigError(f"Prune(examples={self.examples!r}): expected a whole number of at least 1.")
        check_exclude("Prune", self.exclude)

    @property
    def cuts_units(self) -> bool:
        """Whether this changes shapes, rather than setting weights to zero."""
        return all(isinstance(pattern, (Channels, Heads, Layers)) for pattern in self.patterns)

    @property
    def patterns(self) -> tuple[Any, ...]:
        """The pattern, or each of several."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of groups whose units go."""
        return tuple(dict.fromkeys(kind for pattern in self.patterns for kind in pattern.kinds))

    def pattern_of(self, kind: str) -> Any:
        """The first pattern whose units are of this kind."""
        return next(pattern for pattern in self.patterns if kind in pattern.kinds)

    @property
    def replaces_tensors(self) -> bool:
        return self.cuts_units

    @property
    def title(self) -> str:
        names = {Channels: "channels", Heads: "heads", Layers: "layers"}
        what = " and ".join(names.get(type(pattern), "weights") for pattern in self.patterns)
        amount = (
            f"{self.fraction:.0%} of the {what}"
            if self.fraction is not None
            else f"{what} below {self.below:g}"
            if self.below is not None
            else f"{what} to {self.to}"
            if self.to is not None
            else f"{what} to {self.pattern}"
        )
        by = "measured divergence" if isinstance(self.pattern, Layers) else type(self.criterion).__name__
        return f"Prune {amount} by {by}"

    def check(self, model: nn.Module, context: Context) -> None:
        if self.cuts_units and not context.data.has_calibration:
            raise DataError(
                f"Prune: {_names(self.patterns)} runs the model once to see what can be cut, and has no "
                f"data.\n  Pass Data(calibration=batches); labels are not needed."
            )
        if needs_gradients(self.criterion) and (context.data.train is None or context.data.loss is None):
            raise ConfigError(
                f"Prune: the criterion {type(self.criterion).__name__} needs gradients, and there are no labelled data "
                f"or no loss.\n  Pass Data(train=..., loss=gracile.losses.cross_entropy), or use Magnitude()."
            )

        if isinstance(self.to, Latency):
            target_of(self.to, context)

    def plan(self, model: nn.Module, data: Data, *, target: Any = None, seed: int = 0) -> StepRecord:
        """What `compress(model, self, data, seed=seed)` would cut, what it would leave and why, and what that saves.

        The step runs on a copy, so this takes as long as the step; the model is not changed. `layers` has a row for
        each group that would be cut or is left out with its reason; `numbers` holds parameters and multiply-accumulates
        of one example before and after. Raises what the step would raise.
        """
        return plan_step(self, model, data, target, seed)

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self.check(model, context)
        recorder = Recorder(self)
        if isinstance(self.pattern, Layers):
            prune_layers(model, self, context, recorder)
        elif any(isinstance(pattern, Layers) for pattern in self.patterns):
            prune_jointly(model, self, context, recorder)
        elif self.cuts_units:
            prune_units(model, self, context, recorder)
        else:
            prune_weights(model, self, context, recorder)
        return recorder.record()


def needs_gradients(criterion: Any) -> bool:
    """Whether a criterion asks for statistics that only labelled data and a loss can give."""
    return bool(set(criterion.needs) & (GRADIENT_STATS | GATE_STATS))


def _names(patterns: tuple[Any, ...]) -> str:
    return " and ".join(f"{type(pattern).__name__}()" for pattern in patterns)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
