"""Widths to a budget of latency: shared out by tables, then proven on the target and shared out again if they miss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.data import Batch, batch_size
from gracile.environment import instruction_set, vector_floats
from gracile.errors import ConfigError
from gracile.goal import Budget, Latency
from gracile.graph import Group, Trace, cut_macs, tied_sets
from gracile.recipe import Recorder
from gracile.steps.latency.cache import LatencyCache, identity_of
from gracile.steps.latency.search import search_within
from gracile.steps.latency.table import LatencyTable, measure_latency_table, saved_macs
from gracile.steps.latency.timing import Timer
from gracile.steps.pruning.budget import Keep, cut_copy

if TYPE_CHECKING:
    from gracile.steps.prune import Prune

BISECTIONS = 20


@dataclass
class LatencyBudget:
    """A budget, the tables that predict for it, and what measuring has taught about their predictions so far.

    correction: what a cut saved by measurement, as a multiple of what the tables say.
    """

    budget: Latency
    timer: Timer
    table: LatencyTable
    model: nn.Module
    traced: Trace
    correction: float = 1.0
    _macs: dict[tuple[str, int], int] = field(default_factory=dict)
    _measured: dict[tuple[tuple[str, int], ...], float] = field(default_factory=dict)

    def meet(
        self,
        tables: Mapping[str, Sequence[Level]],
        allocation: MeasuredLoss,
        keep_of: Callable[[dict[str, int]], Keep],
    ) -> Keep:
        """The units kept by the least loss that the tables promise within the budget, as measured.

        tables: levels that save multiply-accumulates. keep_of: units removed by group -> units kept.
        Raises ConfigError naming the nearest latency that can be reached.
        """
        levels = self.levels(tables)
        limit = self.limit
        if limit >= 1:
            raise ConfigError(
                f"Prune(to={self.budget}): the model is within this budget already ({self.timer.whole_ms:.3g} ms)."
            )
        found = search_within(
            limit,
            lambda wanted: self._least(levels, allocation, keep_of, wanted),
            self.predict,
            self.measure,
            self.correction,
        )
        self.correction = found.correction
        if found.choice is None:
            raise self._beyond(found.nearest)
        return found.choice

    def most(self, groups: Sequence[Group]) -> dict[str, int]:
        """The most units that the tables know how to remove, by group."""
        sets = tied_sets(groups).items()
        return {g.name: max(self.table.saved.get(name, {}), default=0) for name, members in sets for g in members}

    def check_within_reach(self, narrowest: Keep) -> None:
        """Raise the error of `meet` where the smallest widths are clearly too slow, before any loss is measured."""
        reached = self.measure(narrowest)
        if reached - 2 * self.timer.last_error / self.timer.share > self.limit:
            raise self._beyond(reached)

    @property
    def limit(self) -> float:
        """The budget as a share of the whole model's latency."""
        return self.budget.limit(self.timer.whole_ms) / self.timer.whole_ms

    def levels(self, tables: Mapping[str, Sequence[Level]]) -> dict[str, list[Level]]:
        """The levels with what they save of the latency, without those that a wider one equals or beats.

        Where other groups are cut too, a group saves less than alone: in proportion to its multiply-accumulates.
        """
        found: dict[str, list[Level]] = {}
        for name, levels in tables.items():
            found[name] = []
            most = 0.0
            for level in sorted(levels, key=lambda level: level.removed):
                alone = self._alone(name, level.removed)
                share = self.table.share(name, level.removed) * (level.saved / alone if alone else 1.0)
                if level.removed == 0 or share > most:
                    found[name].append(replace(level, saved=share))
                most = max(most, share)
        return {name: levels for name, levels in found.items() if levels}

    def predict(self, keep: Keep) -> float:
        """What the tables say this cut saves of the latency, group by group in proportion to the work still there."""
        saved, before = 0.0, cut_macs(self.traced, {})
        so_far: Keep = {}
        for name, members in tied_sets(map(self.traced.group, keep)).items():
            so_far.update((group.name, keep[group.name]) for group in members)
            after = cut_macs(self.traced, so_far)
            removed = members[0].units - len(keep[name])
            alone = self._alone(name, removed)
            saved += self.table.share(name, removed) * ((before - after) / alone if alone else 1.0)
            before = after
        return saved

    def predicted_ms(self, keep: Keep) -> float:
        """Latency with these units as the tables say, uncorrected."""
        return self.timer.whole_ms * (1 - self.predict(keep))

    def measure(self, keep: Keep) -> float:
        """Latency with so many units, as a share of the whole model's; the same widths are timed once."""
        widths = tuple(sorted((name, len(kept)) for name, kept in keep.items()))
        if widths not in self._measured:
            self._measured[widths] = self.timer.relative(cut_copy(self.model, self.traced, keep))
        return self._measured[widths]

    def _beyond(self, nearest: float) -> ConfigError:
        return ConfigError(
            f"Prune(to={self.budget}): cannot be met; the nearest that was reached by cutting is "
            f"{nearest * self.timer.whole_ms:.3g} ms of {self.timer.whole_ms:.3g} ms ({nearest:.3f}).\n"
            f"  Ask for at least that, or allow more layers to be cut."
        )

    def _least(
        self,
        levels: Mapping[str, Sequence[Level]],
        allocation: MeasuredLoss,
        keep_of: Callable[[dict[str, int]], Keep],
        wanted: float,
    ) -> Keep:
        """The cut by the smallest amount shared out that is predicted to save what is wanted; else the largest."""
        low, high = 0.0, sum(max(level.saved for level in row) for row in levels.values())
        best = keep_of(allocation.choose_levels(levels, high))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            keep = keep_of(allocation.choose_levels(levels, middle))
            if self.predict(keep) >= wanted:
                high, best = middle, keep
            else:
                low = middle
        return best

    def _alone(self, name: str, removed: int) -> int:
        """Multiply-accumulates that go when this group alone, or this tied set, loses so many units each."""
        key = (name, removed)
        if key not in self._macs:
            self._macs[key] = saved_macs(self.traced, name, removed)
        return self._macs[key]


def with_vector_widths(step: Prune) -> Prune:
    """The step, its allocation trying widths that fill vector registers unless it says which."""
    assert isinstance(step.allocation, MeasuredLoss)
    if step.allocation.multiple_of is not None:
        return step
    return replace(step, allocation=replace(step.allocation, multiple_of=vector_floats()))


def prepare_latency(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    step: Prune,
    context: Context,
    batch: Batch,
    timer: Timer,
    recorder: Recorder,
) -> LatencyBudget:
    """The step's budget with the tables for it, from the cache as far as it has them; notes say what was timed.

    Where the timer's whole model has tables and this is a part of it, without some blocks, they are derived from those.
    """
    allocation = step.allocation
    assert isinstance(step.to, Latency) and isinstance(allocation, MeasuredLoss)
    counts = {group.name: allocation.counts(group.units) for group in groups}
    if timer.known is not None:
        whole, before = timer.known
        if all(set(counts[name]) <= set(whole.saved.get(name, ())) for name in tied_sets(groups)):
            recorder.notes.append("Latency tables of the model with all its blocks, in proportion to the work left.")
            return LatencyBudget(step.to, timer, whole.within(timer.share, before, traced), model, traced)
    cache = LatencyCache(identity_of(model, traced.macs, timer.target, batch))
    start = time.perf_counter()
    table = measure_latency_table(model, traced, groups, counts, timer, cache, context)
    if timer.share == 1:
        timer.known = table, traced
    seconds = time.perf_counter() - start
    recorder.notes += cache.notes
    recorder.notes += [f"Not timed, and so left whole: {reason}." for reason in table.failed]
    how = f"{table.timed} widths timed in {seconds:.0f} s" if table.timed else "no width had to be timed"
    recorder.notes.append(f"Latency table of {len(groups)} groups: {how}; kept in '{cache.path}'.")
    return LatencyBudget(step.to, timer, table, model, traced)


def record_latency(model: nn.Module, timer: Timer, budget: Budget | None, recorder: Recorder) -> None:
    """Time the model as it is now beside the whole one, and record both and what the budget of latency allows."""
    assert isinstance(budget, Latency)
    measured = timer.relative(model) * timer.whole_ms
    recorder.numbers["latency_before_ms"] = timer.whole_ms
    recorder.numbers["latency_ms"] = measured
    limit = budget.limit(timer.whole_ms)
    said = f"Latency of a batch of {batch_size(timer.batch)} on {timer.target.name}, {instruction_set()}: "
    said += f"{timer.whole_ms:.3g} ms before, {measured:.3g} ms after, {limit:.3g} ms allowed"
    if "latency_predicted_ms" in recorder.numbers:
        said += f", {recorder.numbers['latency_predicted_ms']:.3g} ms predicted by the tables"
    recorder.notes.append(f"{said}. Single shares were timed to a standard error of {timer.error:.1%} or less.")
