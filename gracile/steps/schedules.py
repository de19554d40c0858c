"""Schedules: a cut made in several rounds with training between them, instead of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from gracile.context import Context
from gracile.errors import ConfigError
from gracile.goal import Budget
from gracile.patterns import Unstructured
from gracile.recipe import Only, Step, run_in_order
from gracile.report.model import StepRecord
from gracile.steps.distill import Distill, Finetune
from gracile.steps.prune import Prune


class _Schedule(Step):
    """A cut and a training that unroll into parts of both."""

    train: Any

    def check(self, model: nn.Module, context: Context) -> None:
        self.leaves()[0].check(model, context)
        self.train.check(model, context)

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        return run_in_order(self, self.leaves(), model, context)


@dataclass(frozen=True)
class Iterative(_Schedule):
    """Prune, train, prune further, train again: `rounds` times, each round removing the same share of what is left.

    prune: the whole cut, a `Prune` or `only(pattern, Prune(...))`. A fraction f of single weights is 1 − (1 − f)^(k/n)
        after round k of n; units, blocks and budgets shrink by the same ratio in each; a threshold rises evenly.
    train: the step after each cut, `Distill(...)`, `Finetune(...)` or a recipe; every round runs all of it, with the
        learning rate rewound to its start.

    Every cut and every training is a step of its own in the report and in a run directory, which resumes after any.
    Source: Han et al. 2015, arXiv:1506.02626 (rounds); Renda et al. 2020, arXiv:2003.02389 (learning-rate rewinding).
    """

    prune: Step
    train: Step
    _: KW_ONLY
    rounds: int = 3

    def __post_init__(self) -> None:
        _check(self, self.prune, self.rounds)
        if not isinstance(self.train, Step):
            raise ConfigError(
                f"Iterative({self.train!r}): the second argument is the step that trains, e.g. Distill()."
            )

    def leaves(self) -> list[Step]:
        done = [k / self.rounds for k in range(self.rounds + 1)]
        cuts = _cuts(self.prune, done, lambda fraction, share: 1 - (1 - fraction) ** share)
        return [leaf for cut in cuts for step in (cut, self.train) for leaf in step.leaves()]

    @property
    def title(self) -> str:
        return f"{self.rounds} rounds of: {self.prune.title}; {self.train.title}"


@dataclass(frozen=True)
class Gradual(_Schedule):
    """Train once, and prune in `rounds` cuts between its first epochs: much at first, less and less later.

    prune: the whole cut, a `Prune` or `only(pattern, Prune(...))`. After cut k of n the share 1 − (1 − k/n)³ of it is
        made: of the fraction of single weights, of a threshold, or for units and budgets of the logarithm of what
        remains.
    train: `Distill(epochs=...)` or `Finetune(epochs=...)`. Its epochs are divided between the cuts and its learning
        rate goes through one schedule over all of them; the optimizer's moments begin anew after each cut.
    until: share of the epochs by which all cuts are made.

    Every cut and every part of the training is a step of its own in the report and in a run directory.
    Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1. There the cuts come every few hundred steps; here between
    epochs, so that each is judged on held-out data and can be resumed.
    """

    prune: Step
    train: Distill | Finetune
    _: KW_ONLY
    rounds: int = 4
    until: float = 0.5

    def __post_init__(self) -> None:
        _check(self, self.prune, self.rounds)
        if not isinstance(self.train, (Distill, Finetune)):
            raise ConfigError(f"Gradual({self.train!r}): the second argument is Distill(...) or Finetune(...).")
        if self.train.span != (0.0, 1.0):
            raise ConfigError("Gradual: it divides the schedule of its training itself; give that no span.")
        if not (isinstance(self.until, (int, float)) and 0 < self.until <= 1):
            raise ConfigError(f"Gradual(until={self.until!r}): expected a number above 0 and up to 1.")
        if len(set(self._starts())) < self.rounds:
            raise ConfigError(
                f"Gradual(rounds={self.rounds}, until={self.until:g}): {self.train.epochs} epochs have no room for so "
                f"many cuts.\n  Train for at least {-(-self.rounds // self.until):.0f} epochs, or cut in fewer rounds."
            )

    def leaves(self) -> list[Step]:
        epochs, starts = self.train.epochs, [*self._starts(), self.train.epochs]
        done = [1 - (1 - k / self.rounds) ** 3 for k in range(self.rounds + 1)]
        cuts = _cuts(self.prune, done, lambda fraction, share: fraction * share)
        found: list[Step] = []
        for cut, start, end in zip(cuts, starts, starts[1:]):
            part = replace(self.train, epochs=end - start, span=(start / epochs, end / epochs))
            found += [*cut.leaves(), part]
        return found

    @property
    def title(self) -> str:
        return f"{self.train.title}, and in {self.rounds} cuts: {self.prune.title}"

    def _starts(self) -> list[int]:
        """The epoch before which each cut is made."""
        return [int(k * self.until * self.train.epochs / self.rounds) for k in range(self.rounds)]


def _cuts(prune: Step, done: Sequence[float], sparsity: Callable[[float, float], float]) -> list[Step]:
    """The cuts that together are `prune`.

    done: the share of it made before the first and after each, 0 … 1. sparsity: (the fraction of single weights that
    goes in all, share) -> the fraction gone by then.
    """
    if isinstance(prune, Only):
        return [Only(prune.patterns, cut) for cut in _cuts(prune.step, done, sparsity)]
    assert isinstance(prune, Prune)
    return [_cut(prune, before, after, sparsity) for before, after in pairwise(done)]


def _cut(prune: Prune, before: float, after: float, sparsity: Callable[[float, float], float]) -> Prune:
    """The cut that takes a model from the share `before` of the whole one to the share `after`."""
    if prune.below is not None:
        return replace(prune, below=prune.below * after)
    if prune.to is not None:
        return replace(prune, to=_towards(prune.to, before, after))
    assert prune.fraction is not None
    if not prune.cuts_units:  # weights that are gone are still there to be counted, units are not
        return replace(prune, fraction=sparsity(prune.fraction, after))
    return replace(prune, fraction=1 - (1 - prune.fraction) ** (after - before))


def _towards(budget: Budget, before: float, after: float) -> Budget:
    """A budget is of the model as it is at that cut: a fraction of it, or an amount some way from its own."""
    way = after - before if budget.is_fraction else (after - before) / (1 - before)
    return replace(budget, way=budget.way * way)


def _check(step: Step, prune: Step, rounds: int) -> None:
    name = type(step).__name__
    inner = prune
    while isinstance(inner, Only):
        inner = inner.step
    if not isinstance(inner, Prune):
        raise ConfigError(f"{name}({prune!r}): the first argument is the cut, for example Prune(0.5).")
    if not inner.cuts_units and not isinstance(inner.pattern, Unstructured):
        raise ConfigError(
            f"{name}: {inner.pattern} cannot be reached in parts; its amount is its name.\n  Prune first."
        )
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ConfigError(f"{name}(rounds={rounds!r}): expected a whole number of at least 1.")
