"""gracile optimize: the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gracile.cli.command import NOT_MET, command
from gracile.cli.options import (
    class_option,
    data_option,
    make_target,
    model_argument,
    parse_limit,
    run_directory_of,
    saving_options,
    target_options,
)
from gracile.cli.result import save_and_show
from gracile.cli.terminal import Terminal


@command("optimize")
@model_argument
@data_option(required=True)
@target_options(required=True)
@click.option("--max-drop", type=float, default=0.01, show_default=True, help="Largest loss of quality, in its unit.")
@click.option(
    "--objective",
    type=click.Choice(["latency", "bytes", "macs"]),
    default="latency",
    show_default=True,
    help="What to make as small as possible.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="KIND=NUMBER",
    help="A limit: latency=0.4 (of the original), latency-ms=2.0, macs=0.5, bytes=0.3, parameters=1e6. Repeatable.",
)
@click.option(
    "--epochs", type=click.IntRange(min=0), default=4, show_default=True, help="Of distillation for one candidate."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Of the latency. [default: the evaluation batches']")
@click.option("--minutes", type=float, help="No new candidate is begun after that.")
@saving_options
@class_option
def optimize_command(
    terminal: Terminal,
    model: str,
    data_name: str,
    target_name: str,
    precision: str | None,
    threads: int | None,
    limits: tuple[str, ...],
    seed: int,
    out: Path,
    run_dir: Path | None,
    class_name: str | None,
    **goal: Any,
) -> None:
    """Find the smallest model that keeps the limits, measured on the runtime that serves it.

    Stopped at any time, the same command goes on where it was.
    """
    from gracile.goal import Goal
    from gracile.inputs import load_data, load_model
    from gracile.optimize import optimize
    from gracile.result import check_destination

    target = make_target(target_name, precision, threads)
    wanted = Goal(target=target, limits=tuple(parse_limit(text) for text in limits), **goal)
    check_destination(out)
    network, data = load_model(model, class_name), load_data(data_name)
    terminal.run_dir = run_directory_of(out, run_dir)
    with terminal.progress() as on_progress:
        result = optimize(network, data, wanted, seed=seed, run_dir=terminal.run_dir, on_progress=on_progress)
    save_and_show(terminal, result, out, terminal.run_dir)
    if not result.met:
        click.get_current_context().exit(NOT_MET)
