"""Ranks to a budget of latency: timed inside the model on the target, and the choice proven there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError, NothingChangedError, TargetError
from gracile.files import sha256_json
from gracile.goal import Latency
from gracile.graph import Trace
from gracile.recipe import Recorder
from gracile.steps.latency.cache import LatencyCache, identity_of
from gracile.steps.latency.search import search_within
from gracile.steps.latency.table import EACH
from gracile.steps.latency.timing import Timer
from gracile.steps.low_rank.ranks import Option, choose_ranks
from gracile.steps.low_rank.select import Candidate, Rank, factorize_at_random

if TYPE_CHECKING:
    from gracile.steps.factorize import Factorize

#: A rank counts as faster if it saves more than so many standard errors of its measurement.
CERTAIN = 2.0
#: A share with a larger standard error, of a machine that was busy then, is not taken from the cache.
TRUSTED = 0.02

Ranks = Mapping[Candidate, Sequence[Rank]]


@dataclass
class RankLatency:
    """saved: layer -> rank -> share of the whole model's latency that goes when this layer alone has it."""

    budget: Latency
    timer: Timer
    model: nn.Module
    context: Context
    saved: Mapping[Candidate, Mapping[Rank, float]]
    _measured: dict[tuple[tuple[str, Rank], ...], float] = field(default_factory=dict)

    def ranks(self) -> dict[Candidate, list[Rank]]:
        """The ranks that are faster than the whole layer, by layer."""
        return {candidate: list(row) for candidate, row in self.saved.items()}

    def saves(self, candidate: Candidate, rank: Rank) -> float:
        """The share of the latency that the layer alone saves at this rank."""
        return self.saved[candidate][rank]

    def meet(self, losses: Mapping[str, Mapping[Rank, float]], power: float) -> dict[str, Rank]:
        """The ranks of least loss within the budget, as measured. Raises ConfigError naming the nearest latency."""
        whole_ms = self.timer.whole_ms
        limit = self.budget.limit(whole_ms) / whole_ms
        if limit >= 1:
            raise ConfigError(
                f"Factorize(to={self.budget}): the model is within this budget already ({whole_ms:.3g} ms)."
            )
        options = {
            c.name: [Option(None, 0.0, 0.0), *(Option(r, loss, row[r]) for r, loss in losses[c.name].items())]
            for c, row in self.saved.items()
            if c.name in losses
        }
        found = search_within(limit, lambda wanted: choose_ranks(options, wanted, power), self.predict, self.measure)
        if found.choice is None:
            raise ConfigError(
                f"Factorize(to={self.budget}): cannot be met; the nearest that was reached is "
                f"{found.nearest * whole_ms:.3g} ms of {whole_ms:.3g} ms ({found.nearest:.3f}).\n"
                f"  Ask for at least that, allow more layers to be factorized, or try lower ranks by more levels=."
            )
        return found.choice

    def predict(self, ranks: Mapping[str, Rank]) -> float:
        """The share of the latency that layers of these ranks save, by the sum of what each saves alone."""
        return sum(row[ranks[candidate.name]] for candidate, row in self.saved.items() if candidate.name in ranks)

    def predicted_ms(self, ranks: Mapping[str, Rank]) -> float:
        """Latency with these ranks as the single measurements say, uncorrected."""
        return self.timer.whole_ms * (1 - self.predict(ranks))

    def measure(self, ranks: Mapping[str, Rank]) -> float:
        """Latency with these ranks, as a share of the whole model's; the same ranks are timed once."""
        key = tuple(sorted(ranks.items()))
        if key not in self._measured:
            chosen = {c: ranks[c.name] for c in self.saved if c.name in ranks}
            trial, _ = factorize_at_random(self.model, chosen, self.context.generator("factors"))
            self._measured[key] = self.timer.relative(trial)
        return self._measured[key]


def prepare_rank_latency(
    model: nn.Module,
    traced: Trace,
    ranks: Ranks,
    step: Factorize,
    context: Context,
    batch: Batch,
    timer: Timer,
    recorder: Recorder,
) -> RankLatency:
    """What each layer saves at each rank, from the cache as far as it has it; ranks that are not faster are left out.

    Equal layers on equal inputs save the same: they are factorized together and share one measurement. A layer without
    a faster rank is recorded as skipped. Raises NothingChangedError where no layer has one.
    """
    assert isinstance(step.to, Latency)
    cache = LatencyCache(identity_of(model, traced.macs, timer.target, batch))
    alike: dict[str, list[Candidate]] = {}
    for candidate in ranks:
        alike.setdefault(_signature(model, traced, candidate), []).append(candidate)
    saved: dict[Candidate, dict[Rank, float]] = {}
    start, timed = time.perf_counter(), 0
    for done, (signature, same) in enumerate(alike.items()):
        faster: dict[Rank, float] = {}
        slower: dict[Rank, float] = {}
        try:
            for rank in sorted(ranks[same[0]], reverse=True):
                share, error, fresh = _share(model, same, rank, signature, cache, timer, context)
                timed += fresh
                (faster if share > CERTAIN * error else slower)[rank] = share / len(same)
        except TargetError as problem:
            for candidate in same:
                recorder.skip(candidate.name, candidate.kind, f"not timed: {str(problem).splitlines()[0]}")
            continue
        finally:
            context.progress("latency of ranks", done + 1, len(alike))
        if slower and faster:
            recorder.notes.append(
                f"{', '.join(c.name for c in same)}: not faster on {timer.target.name} at rank "
                f"{', '.join(map(str, sorted(slower)))}, and so not tried there."
            )
        for candidate in same:
            if faster:
                saved[candidate] = faster
            else:
                best = max(slower.values())
                reason = f"no rank is faster on {timer.target.name}: the best saves {best:.2%} of the latency"
                recorder.skip(candidate.name, candidate.kind, reason)
    recorder.notes += cache.notes
    how = f"{timed} ranks timed in {time.perf_counter() - start:.0f} s" if timed else "no rank had to be timed"
    recorder.notes.append(f"Latency of {len(alike)} kinds of layers: {how}; kept in '{cache.path}'.")
    if not saved:
        rows = [f"{row.name}: {row.reason}" for row in recorder.layers[:5]]
        raise NothingChangedError("Factorize: no layer is faster factorized.\n  " + "\n  ".join(rows))
    ordered = {candidate: saved[candidate] for candidate in ranks if candidate in saved}
    return RankLatency(step.to, timer, model, context, ordered)


def _share(
    model: nn.Module,
    same: Sequence[Candidate],
    rank: Rank,
    signature: str,
    cache: LatencyCache,
    timer: Timer,
    context: Context,
) -> tuple[float, float, bool]:
    """What these layers together save at this rank, the standard error of that, and whether it was measured now."""
    signature += ":sides" if rank.spatial else ""
    share, error = cache.get(signature, rank.value), cache.get(f"{signature}:error", rank.value)
    if share is not None and error is not None and error <= TRUSTED:
        return share, error, False
    trial, _ = factorize_at_random(model, dict.fromkeys(same, rank), context.generator("factors"))
    share = 1 - timer.relative(trial, seconds=EACH)
    error = timer.last_error
    cache.put(signature, rank.value, share)
    cache.put(f"{signature}:error", rank.value, error)
    return share, error, True


def _signature(model: nn.Module, traced: Trace, candidate: Candidate) -> str:
    """Equal for layers whose factors do the same to the work of the model."""
    info = next(layer for layer in traced.layers if layer.name == candidate.name)
    settings = model.get_submodule(candidate.name).extra_repr()
    shapes = [list(info.input_shape), list(info.output_shape)]
    return sha256_json(["rank", candidate.kind, settings, candidate.element_bytes, *shapes])[:24]
