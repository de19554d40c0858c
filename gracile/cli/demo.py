"""gracile demo: a real model on real data, from the package alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gracile.cli.command import NOT_MET, command
from gracile.cli.options import TARGETS, make_target
from gracile.cli.result import save_and_show
from gracile.cli.terminal import Terminal

#: Epochs of distillation for one candidate, and the seconds that this keeps the demo within.
EPOCHS, QUICK_EPOCHS = 4, 1


@command("demo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Directory for the compressed model and its report.",
)
@click.option("--quick", is_flag=True, help="Train less: a first look in half the time.")
def demo(terminal: Terminal, out: Path, quick: bool) -> None:
    """Compress a small trained network that reads handwritten digits; the network and its data are in the package."""
    from gracile.demo import load_data, load_model
    from gracile.goal import Goal
    from gracile.optimize import optimize
    from gracile.result import check_destination

    check_destination(out)
    target = first_target(terminal)
    terminal.say(f"Making a network that reads handwritten digits faster on {target.name}, losing at most 1.5 points.")
    goal = Goal(target=target, max_drop=0.015, objective="latency", epochs=QUICK_EPOCHS if quick else EPOCHS)
    with terminal.progress() as on_progress:
        result = optimize(load_model(), load_data(), goal, on_progress=on_progress)
    save_and_show(terminal, result, out, None)
    if not result.met:
        click.get_current_context().exit(NOT_MET)


def first_target(terminal: Terminal) -> Any:
    """ONNX Runtime, or else the first runtime that is installed, with a word about what is not."""
    for name in TARGETS:
        target = make_target(name)
        missing = target.available()
        if missing is None:
            return target
        terminal.say(f"{name} is passed over: {missing}")
    raise AssertionError("PyTorch itself is always available")
