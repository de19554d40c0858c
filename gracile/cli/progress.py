"""Progress for a person: one bar for each phase under way, or now and then a line."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from gracile.context import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

#: A phase with at most so many items is told item by item where there are no bars.
FEW = 20
#: Seconds between two lines about the same longer phase.
PAUSE = 30.0


def key_of(progress: Progress) -> str:
    """What makes two reports one phase: the first word ("measure original", "measure compressed")."""
    return progress.phase.split(" ", 1)[0]


class Bars:
    """One bar for each phase under way, innermost last, with the time remaining; on stderr, gone at the end.

    A report of an outer phase ends the phases inside it.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._open: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        key = key_of(progress)
        self._close_inside(key)
        if progress.total is not None and progress.done >= progress.total:
            self._remove(key)
            return
        task = self._open.get(key)
        if task is None:
            task = self._open[key] = self._bars.add_task(progress.phase, total=progress.total, note="")
        elif progress.done < self._bars.tasks[self._bars.task_ids.index(task)].completed:
            self._bars.reset(task)
        self._bars.update(
            task, description=progress.phase, completed=progress.done, total=progress.total, note=progress.note
        )

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases under way, outermost first."""
        return tuple(self._open)

    def _close_inside(self, key: str) -> None:
        inner = list(self._open)
        for name in inner[inner.index(key) + 1 :] if key in self._open else ():
            self._remove(name)

    def _remove(self, key: str) -> None:
        task = self._open.pop(key, None)
        if task is not None:
            self._bars.remove_task(task)


class Lines:
    """A line for each item of a short phase, and one every half minute for a long one, for logs."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._last = clock()
        self._seen: tuple[str, int, str] | None = None

    def __call__(self, progress: Progress) -> None:
        short = progress.total is not None and progress.total <= FEW
        if progress.total is not None and progress.done >= progress.total:
            return
        item = (progress.phase, progress.done, progress.note)
        if (short and item != self._seen) or (not short and self._clock() - self._last >= PAUSE):
            self._seen, self._last = item, self._clock()
            count = f"{progress.done}/{progress.total}" if progress.total is not None else str(progress.done)
            self._say(" ".join(part for part in (progress.phase, count, progress.note) if part))
