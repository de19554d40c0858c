"""Factorize: two thin layers in place of one, of ranks that cost the outputs least for what they save."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

from torch import nn

from gracile.context import Context
from gracile.data import Data
from gracile.environment import vector_floats
from gracile.errors import ConfigError, DataError
from gracile.goal import Budget, Latency
from gracile.graph import trace
from gracile.recipe import Recorder, Step
from gracile.report.model import LayerRow, StepRecord
from gracile.select import check_exclude
from gracile.sharing import own_parameters, share_parameters
from gracile.solvers import LeastSquares, LowRank, SpatialLowRank
from gracile.stats.collect import first_batch
from gracile.steps.correct import correct_statistics
from gracile.steps.latency.budget import record_latency
from gracile.steps.latency.timing import target_of, timer_for
from gracile.steps.low_rank.latency import prepare_rank_latency
from gracile.steps.low_rank.layers import factorize_layers, prove_factorized
from gracile.steps.low_rank.ranks import amount_to_save, choose_ranks, measure_losses, options_of, ranks_of, saved_of
from gracile.steps.low_rank.select import Candidate, Rank, select_layers
from gracile.steps.plan import plan_step
from gracile.steps.pruning.sequence import targets_of

#: Batches on which the factorized model is proven: a forward may branch on its data, so that one shows too little.
CHECKED_BATCHES = 3


@dataclass(frozen=True)
class Factorize(Step):
    """Replace linear and ungrouped convolution layers by two of low rank, W ≈ W₂ W₁, over r channels between both.

    Every layer is tried alone at several ranks, and whole; those ranks are taken that together save enough with the
    least Σ loss^power, the loss being the divergence of the model's outputs. Then layer after layer is factorized, each
    on the inputs that it gets by then, towards what it gave in the original.

    fraction: share of the weights to remove, in (0, 1), of the layers that may be factorized: what is skipped with a
        reason counts neither among the weights nor among those removed, and biases do not count.
    to: factorize until a budget is met: MACs, Parameters, Bytes or Latency, that of the first calibration batch on the
        target, measured in turn with the model as it was. Ranks that are not faster there by more than the error of
        timing are not taken. Exactly one of `fraction` and `to` is given.
    solver: how factors are found for a rank.
    spatial: how the factors of a two-dimensional convolution are found that split it along the sides of its kernel, one
        of h x 1 and then one of 1 x w or the other way round: at equal cost nearer to it, as a rule, than one of h x w
        and then one of 1 x 1. Both forms are tried, and the ranks of either are options. None: only the second.
    repair: refits layers that stay whole behind one that was factorized: solvers.LeastSquares(). A refit is kept only
        if it lowers the layer's error on held-out calibration batches. None: they keep their weights.
    levels: ranks tried of each layer, in equal steps below the rank from which on nothing is saved.
    examples: calibration examples behind the loss of one rank.
    power: of the losses in the choice. Below 1, a layer that is hurt already is hurt on rather than a new one.
    multiple_of: ranks tried are multiples of the largest power of two up to this that the largest rank holds twice.
        None: any rank; of a latency budget, the floats in a vector of this processor.
    correct: batch-norm and bias correction afterwards, by the difference to the model before on the calibration
        batches; kept only if the output error on held-out batches falls.
    exclude: name patterns of layers left alone.
    """

    fraction: float | None = None
    _: KW_ONLY
    to: Budget | None = None
    solver: LowRank = LowRank()
    spatial: SpatialLowRank | None = SpatialLowRank()
    repair: LeastSquares | None = None
    levels: int = 8
    examples: int = 512
    power: float = 1.0
    multiple_of: int | None = None
    correct: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.to is None):
            raise ConfigError(
                f"Factorize: {'no amount' if self.to is None else 'fraction and to'} given.\n"
                f"  Give one of them: Factorize(0.3) or Factorize(to=MACs(0.6))."
            )
        if self.fraction is not None and not (_is_number(self.fraction) and 0 < self.fraction < 1):
            raise ConfigError(
                f"Factorize({self.fraction!r}): the fraction to remove must be above 0 and below 1.\n"
                f"  Factorize(0.3) removes 30 % of the weights."
            )
        if (self.to is not None and type(self.to) is Budget) or not isinstance(self.to, (Budget, type(None))):
            raise ConfigError(f"Factorize(to={self.to!r}): expected a budget, for example MACs(0.5).")
        if not isinstance(self.solver, LowRank):
            raise ConfigError(f"Factorize(solver={self.solver!r}): expected solvers.LowRank().")
        if self.spatial is not None and not isinstance(self.spatial, SpatialLowRank):
            raise ConfigError(f"Factorize(spatial={self.spatial!r}): expected solvers.SpatialLowRank() or None.")
        if self.repair is not None and not isinstance(self.repair, LeastSquares):
            raise ConfigError(f"Factorize(repair={self.repair!r}): expected solvers.LeastSquares() or None.")
        for name, value in (("levels", self.levels), ("examples", self.examples), ("multiple_of", self.multiple_of)):
            if not (name == "multiple_of" and value is None) and not _is_count(value):
                raise ConfigError(f"Factorize({name}={value!r}): expected a whole number of at least 1.")
        if not (_is_number(self.power) and 0 < self.power <= 2):
            raise ConfigError(f"Factorize(power={self.power!r}): expected a number above 0, at most 2.")
        check_exclude("Factorize", self.exclude)

    @property
    def replaces_tensors(self) -> bool:
        return True

    @property
    def title(self) -> str:
        amount = f"{self.fraction:.0%} of the weights away" if self.fraction is not None else f"to {self.to}"
        return f"Factorize {amount}"

    def check(self, model: nn.Module, context: Context) -> None:
        if not context.data.has_calibration:
            raise DataError(
                "Factorize: ranks and factors are chosen by the inputs of layers, and there are no data.\n"
                "  Pass Data(calibration=batches); labels are not needed."
            )
        if isinstance(self.to, Latency):
            target_of(self.to, context, "Factorize")

    def plan(self, model: nn.Module, data: Data, *, target: Any = None, seed: int = 0) -> StepRecord:
        """What `compress(model, self, data, seed=seed)` would factorize, what it would leave and why, what it saves.

        The step runs on a copy, so this takes as long as the step; the model is not changed. `layers` has a row for
        each layer that would be factorized or is left out with its reason; `numbers` holds parameters and
        multiply-accumulates of one example before and after. Raises what the step would raise.
        """
        return plan_step(self, model, data, target, seed)

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self.check(model, context)
        recorder, batch = Recorder(self), first_batch(context.data)
        checked = list(itertools.islice(context.data.calibration_batches, CHECKED_BATCHES))
        reference = share_parameters(model).eval()
        traced = trace(model, lambda net: context.data.forward(net, batch))
        candidates = select_layers(model, traced, self, context, checked, recorder)
        targets = targets_of(reference, traced, [candidate.name for candidate in candidates], context)
        with timer_for(self.to, model, context, batch, "Factorize") as timer:
            multiple = self.multiple_of or (vector_floats() if timer is not None else 1)
            ranks = {candidate: ranks_of(candidate, self.levels, multiple) for candidate in candidates}
            latency = None
            if timer is not None:
                latency = prepare_rank_latency(model, traced, ranks, self, context, batch, timer, recorder)
                ranks = latency.ranks()
            saved = latency.saves if latency is not None else partial(saved_of, budget=self.to)
            losses = measure_losses(model, traced, ranks, self, targets, saved, context, recorder)
            if latency is not None:
                chosen = latency.meet(losses, self.power)
                recorder.numbers["latency_predicted_ms"] = latency.predicted_ms(chosen)
            else:
                options = options_of(candidates, losses, self.to)
                chosen = choose_ranks(options, amount_to_save(options, candidates, self, model, traced), self.power)
            if self.repair is not None:
                own_parameters(model, reference)
            picked = {c: chosen.get(c.name) for c in candidates if c.name in losses}
            factorize_layers(model, reference, traced, picked, self, targets, context, recorder)
            prove_factorized(model, reference, lambda net: [context.data.forward(net, b) for b in checked], recorder)
            if timer is not None:
                record_latency(model, timer, self.to, recorder)
        _record(candidates, losses, chosen, recorder)
        own_parameters(model, reference)
        if self.correct:
            correct_statistics(model, reference, context, recorder, {})
        return recorder.record()


def _record(
    candidates: Sequence[Candidate],
    losses: Mapping[str, Mapping[Rank, float]],
    chosen: Mapping[str, Rank],
    recorder: Recorder,
) -> None:
    """Rows of layers that stay whole by choice, and the sums."""
    for candidate in candidates:
        refitted = any(row.name == candidate.name for row in recorder.layers)
        if candidate.name in losses and candidate.name not in chosen and not refitted:
            recorder.layers.append(
                LayerRow(
                    name=candidate.name,
                    kind=candidate.kind,
                    action="kept",
                    kept=candidate.full_rank(),
                    of=candidate.full_rank(),
                    reason="others lose less for what they save",
                )
            )
    whole = sum(candidate.weights for candidate in candidates)
    left = sum(c.weights_at(chosen[c.name]) if c.name in chosen else c.weights for c in candidates)
    recorder.numbers |= {
        "layers_factorized": float(len(chosen)),
        "weights_before": float(whole),
        "weights_after": float(left),
    }
    recorder.notes.append(
        f"{len(chosen)} of {len(candidates)} layers that may be factorized are: {left} of {whole} weights are left."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
