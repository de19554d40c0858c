"""Step, Recipe and only: what changes a model, several of them in order, and one of them for some layers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gracile.config import to_config
from gracile.context import Context, derive_seed
from gracile.errors import ConfigError
from gracile.report.model import LayerRow, StepRecord
from gracile.select import Select
from gracile.surgery import Edit


class Step(ABC):
    """A frozen dataclass that changes a model in place when called, and returns a record of what it did.

    `check` raises what is wrong with the settings for this model and data, before anything is changed.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, context: Context) -> StepRecord: ...

    def check(self, model: nn.Module, context: Context) -> None:
        """Raise a GracileError if this step cannot do its work on this model with these data."""
        return None

    def leaves(self) -> list[Step]:
        """The steps that run one after another in its stead; each is kept when it is done. Itself, if it is one."""
        return [self]

    @property
    def replaces_tensors(self) -> bool:
        """Whether it writes into no parameter it is given, but puts new ones in their place or copies them first.

        Such a step may be given a model that shares its parameters with another (`gracile.sharing`).
        """
        return False

    @property
    def title(self) -> str:
        """A few words for a person: what the step does."""
        return type(self).__name__


@dataclass(frozen=True, init=False)
class Recipe(Step):
    """Steps in order; itself a step. `Recipe(Prune(0.3), Distill(), Quantize(W8A8))`."""

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step) -> None:
        if not steps:
            raise ConfigError("Recipe(): no steps.\n  Give at least one, for example Recipe(Prune(0.3)).")
        for step in steps:
            if not isinstance(step, Step):
                raise ConfigError(
                    f"Recipe: {step!r} is not a step.\n"
                    f"  Steps are Prune, Factorize, Quantize, Distill, Finetune, Iterative, Gradual, only."
                )
        object.__setattr__(self, "steps", tuple(steps))

    def check(self, model: nn.Module, context: Context) -> None:
        for step in self.steps:
            step.check(model, context)

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        return run_in_order(self, self.steps, model, context)

    def leaves(self) -> list[Step]:
        return [leaf for step in self.steps for leaf in step.leaves()]

    @property
    def title(self) -> str:
        return ", ".join(step.title for step in self.steps)


@dataclass(frozen=True)
class Only(Step):
    """A step restricted to the layers that match one of the patterns."""

    patterns: tuple[str, ...]
    step: Step

    def _context(self, context: Context) -> Context:
        return replace(context, select=(context.select or Select()).narrowed(*self.patterns))

    def check(self, model: nn.Module, context: Context) -> None:
        names = [name for name, _ in model.named_modules() if name]
        Select().narrowed(*self.patterns).check(names)
        self.step.check(model, self._context(context))

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        record = self.step(model, self._context(context))
        return replace(record, step=to_config(self))

    def leaves(self) -> list[Step]:
        return [Only(self.patterns, leaf) for leaf in self.step.leaves()]

    @property
    def replaces_tensors(self) -> bool:
        return self.step.replaces_tensors

    @property
    def title(self) -> str:
        return f"{self.step.title} (only {', '.join(self.patterns)})"


def only(pattern: str | Sequence[str], step: Step) -> Only:
    """The step, for layers whose name matches the pattern ("blocks.*.mlp.*"), or one of several, and no others."""
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ConfigError(f"only({pattern!r}, ...): expected a layer name pattern, or several.")
    if not isinstance(step, Step):
        raise ConfigError(f"only({pattern!r}, {step!r}): the second argument is not a step.")
    return Only(patterns, step)


def run_in_order(whole: Step, steps: Sequence[Step], model: nn.Module, context: Context) -> StepRecord:
    """The record of a step made of others, after each has changed the model in turn, with a seed of its own."""
    run_seed = context.seed if context.run_seed is None else context.run_seed
    records = []
    for index, step in enumerate(steps):
        directory = context.directory / f"{index}" if context.directory is not None else None
        own = replace(context, seed=derive_seed(context.seed, index), run_seed=run_seed, directory=directory)
        records.append(step(model, own))
    return merge_records(to_config(whole), whole.title, records)


def merge_records(step: dict[str, Any], title: str, records: Sequence[StepRecord]) -> StepRecord:
    """One record for several steps, their rows, notes and edits in order; `numbers` of later steps win."""
    numbers: dict[str, float] = {}
    for record in records:
        numbers.update(record.numbers)
    return StepRecord(
        step=step,
        title=title,
        seconds=sum(r.seconds for r in records),
        layers=tuple(row for r in records for row in r.layers),
        notes=tuple(note for r in records for note in r.notes),
        numbers=numbers,
        edits=tuple(edit for r in records for edit in r.edits),
    )


class Recorder:
    """Gathers what a step does and makes its record."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.layers: list[LayerRow] = []
        self.notes: list[str] = []
        self.numbers: dict[str, float] = {}
        self.edits: list[Edit] = []
        self._start = time.perf_counter()

    def skip(self, name: str, kind: str, reason: str) -> None:
        """Note a layer that was selected and left as it was."""
        self.layers.append(LayerRow(name=name, kind=kind, action="skipped", reason=reason))

    def record(self) -> StepRecord:
        """The record, with the time since the recorder was made."""
        return StepRecord(
            step=to_config(self.step),
            title=self.step.title,
            seconds=time.perf_counter() - self._start,
            layers=tuple(self.layers),
            notes=tuple(self.notes),
            numbers=dict(self.numbers),
            edits=tuple(self.edits),
        )
