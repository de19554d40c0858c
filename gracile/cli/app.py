"""The group of all commands."""

from __future__ import annotations

import click

from gracile.cli.bench import bench
from gracile.cli.command import output_options
from gracile.cli.compress import compress_command
from gracile.cli.demo import demo
from gracile.cli.doctor import doctor_command
from gracile.cli.evaluate import evaluate
from gracile.cli.export import export_command
from gracile.cli.inspect import inspect_command
from gracile.cli.optimize import optimize_command
from gracile.cli.report import report
from gracile.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gracile")
@output_options
def main() -> None:
    """Make a trained PyTorch model smaller and faster on the runtime that serves it, and measure what that costs.

    MODEL is package.module:factory, path/to/file.py:factory, a directory that Gracile saved, or one with a Hugging Face
    config.json. DATA is a factory that returns gracile.Data. The current directory is searched for modules.

    Exit codes: 0 done, and the goal met; 3 the goal not met, the best result saved; 2 wrong usage; 1 failure; 130
    stopped.
    """


for command in (
    demo,
    inspect_command,
    optimize_command,
    compress_command,
    evaluate,
    export_command,
    bench,
    report,
    doctor_command,
):
    main.add_command(command)
