"""Where a command's output goes: results to stdout, progress and complaints to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gracile.cli.progress import Bars, Lines
from gracile.context import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Width of tables that do not go to a terminal.
PLAIN_WIDTH = 120


@dataclass
class Terminal:
    """What the output options ask for, and the streams.

    run_dir: set by a command that keeps its progress there, for the message when it is stopped.
    """

    json: bool = False
    quiet: bool = False
    traceback: bool = False
    run_dir: Path | None = None
    _stdout: IO[str] | None = field(default=None, repr=False)

    @contextmanager
    def reserved_stdout(self) -> Iterator[None]:
        """Keep stdout for `show`; prints by anyone else go to stderr."""
        self._stdout = sys.stdout
        with redirect_stdout(sys.stderr):
            yield

    def show(self, shown: RenderableType, data: Any) -> None:
        """Write the result: `shown` for a person, or `data` with --json."""
        out = self._stdout or sys.stdout
        if self.json:
            out.write(json.dumps(data, indent=1, default=str) + "\n")
            out.flush()
            return
        from rich.console import Console

        width = None if out.isatty() else PLAIN_WIDTH
        console = Console(file=out, width=width, soft_wrap=False, highlight=False)
        console.print(shown)

    def say(self, text: str) -> None:
        """A remark for a person, on stderr; not with --quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def complain(self, text: str) -> None:
        """An error, on stderr."""
        click.echo(text.rstrip(), err=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None] | None]:
        """What to pass as `on_progress`: bars with the time remaining, or a few lines where stderr is no terminal."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            with Bars() as bars:
                yield bars
        else:
            yield Lines(self.say)
