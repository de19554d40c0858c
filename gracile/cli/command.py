"""What all commands share: output options, errors without tracebacks, exit codes."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gracile.cli.terminal import Terminal
from gracile.errors import ConfigError, GracileError

#: Exit codes; click's own for usage is 2.
FAILED, USAGE, NOT_MET, STOPPED = 1, 2, 3, 130

Function = TypeVar("Function", bound=Callable[..., Any])

pass_terminal = click.make_pass_decorator(Terminal, ensure=True)


class Command(click.Command):
    """A command that turns a GracileError into a few lines on stderr and an exit code.

    Only results go to stdout: whatever the model, the data or a library prints in the meantime goes to stderr.
    """

    def invoke(self, ctx: click.Context) -> Any:
        terminal = ctx.ensure_object(Terminal)
        with terminal.reserved_stdout():
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                terminal.complain(_stopped(terminal))
                ctx.exit(STOPPED)
            except GracileError as error:
                if terminal.traceback:
                    terminal.complain(traceback.format_exc())
                terminal.complain(f"Error: {error}")
                ctx.exit(USAGE if isinstance(error, ConfigError) else FAILED)
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise  # the reader of a pipe went away; click ends quietly
                terminal.complain(traceback.format_exc() if terminal.traceback else _unexpected(error))
                ctx.exit(FAILED)


def output_options(function: Function) -> Function:
    """--json, --quiet and --traceback, before or after the command's name."""
    for name, text in (
        ("--traceback", "Show where an error arose."),
        ("--quiet", "Show the result only, no progress."),
        ("--json", "Write the result as JSON to stdout, and nothing else there."),
    ):
        function = click.option(name, is_flag=True, expose_value=False, callback=_remember, help=text)(function)
    return function


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command of this name with the output options, given the terminal as its first argument."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return click.command(name, cls=Command)(output_options(pass_terminal(function)))

    return decorate


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        setattr(ctx.ensure_object(Terminal), str(parameter.name), True)


def _stopped(terminal: Terminal) -> str:
    if terminal.run_dir is None:
        return "Stopped."
    return (
        f"Stopped; the run directory '{terminal.run_dir}' keeps what was finished; the same command goes on from there."
    )


def _unexpected(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return (
        f"Unexpected error: {message} ({Path(frame.filename).name}, line {frame.lineno})\n"
        f"  Run it again with --traceback to see how it came about."
    )
