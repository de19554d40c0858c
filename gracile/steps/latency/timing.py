"""Models timed on a target beside the one that a step began with, so that a slower minute slows both."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError, TargetError
from gracile.evaluate.latency import measure_relative
from gracile.goal import Budget, Latency

if TYPE_CHECKING:
    from gracile.graph import Trace
    from gracile.steps.latency.table import LatencyTable

#: Seconds of timing at least, for a model by which something is decided.
CAREFUL = 1.5


class Timer:
    """The whole model, exported once and kept loaded; other models are exported, timed in turn with it, and dropped.

    whole_ms: median latency of the whole model when it was loaded: what shares of it are turned into milliseconds by.
    share: that model's latency as a share of the one loaded, 1 unless made by `starting_from`.
    known: the whole model's table of latency and its trace, once measured.
    """

    def __init__(self, model: nn.Module, target: Any, batch: Batch, folder: Path, context: Context) -> None:
        self.target, self.batch = target, batch
        self._folder, self._feed = folder, context.data.feed
        self._whole = self._call(model, self._folder)
        found = measure_relative(self._whole, self._whole, seconds=CAREFUL)
        self.whole_ms, self.share, self._errors = found.reference_ms, 1.0, [found.error]
        self.known: tuple[LatencyTable, Trace] | None = None

    @property
    def error(self) -> float:
        """The largest standard error of a share of the whole model's latency so far; it grows with what else runs."""
        return max(self._errors)

    @property
    def last_error(self) -> float:
        """The standard error of the share measured last."""
        return self._errors[-1]

    def relative(self, model: nn.Module, seconds: float = CAREFUL) -> float:
        """The model's latency as a share of the whole one's. Raises TargetError where it cannot be exported."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            found = measure_relative(self._whole, self._call(model, Path(folder)), seconds=seconds)
        self._errors.append(found.error)
        return found.share / self.share

    def starting_from(self, share: float) -> Timer:
        """This timer for a model that takes such a share of the whole one's latency, and for cuts of it.

        Its shares and `whole_ms` are that model's, and what it times is still timed beside the whole one.
        """
        found = copy.copy(self)
        found.whole_ms, found.share = self.whole_ms * share, self.share * share
        return found

    def _call(self, model: nn.Module, folder: Path) -> Callable[[], Any]:
        runner = self.target.load(
            self.target.export(model, self.batch, folder / f"model{self.target.suffix}", feed=self._feed)
        )
        fed = self._feed(self.batch) if self._feed is not None else self.batch
        return lambda: runner(fed)


@contextmanager
def timer_for(
    budget: Budget | None, model: nn.Module, context: Context, batch: Batch, step: str = "Prune"
) -> Iterator[Timer | None]:
    """A timer with the model loaded on the budget's target; None where the budget is none of latency.

    step: the name of the step, for errors.
    """
    if not isinstance(budget, Latency):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="gracile-", ignore_cleanup_errors=True) as folder:
        yield Timer(model, target_of(budget, context, step), batch, Path(folder), context)


def target_of(budget: Latency, context: Context, step: str = "Prune") -> Any:
    """The runtime to measure on; raises ConfigError where none is given, TargetError where it is not installed."""
    target = budget.target or context.target
    if target is None:
        raise ConfigError(
            f"{step}(to={budget}): no target to measure on.\n  Pass Latency(0.5, target=OnnxRuntime()), or "
            f"compress(..., target=OnnxRuntime())."
        )
    missing = target.available()
    if missing is not None:
        raise TargetError(f"{step}(to={budget}): the target {target.name} cannot be used here: {missing}")
    return target
