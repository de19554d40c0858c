"""gracile compress: a recipe of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gracile.cli.command import command
from gracile.cli.options import (
    CRITERIA,
    class_option,
    data_option,
    make_criterion,
    make_pattern,
    model_argument,
    run_directory_of,
    saving_options,
    target_options,
    usable_target,
)
from gracile.cli.result import save_and_show
from gracile.cli.terminal import Terminal
from gracile.errors import ConfigError

if TYPE_CHECKING:
    from gracile.recipe import Step


@command("compress")
@model_argument
@data_option(required=False, help="Factory that returns gracile.Data; not needed for weight-only formats.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="JSON file with the steps, instead of the options below."
)
@click.option("--prune", "fraction", type=float, metavar="FRACTION", help="Share to remove, such as 0.3.")
@click.option("--pattern", default=None, help="What is removed: weights, channels, heads, 2:4. [default: weights]")
@click.option("--criterion", type=click.Choice(CRITERIA), help="What is kept. [default: magnitude]")
@click.option(
    "--factorize", "low_rank", type=float, metavar="FRACTION", help="Share of the weights that low rank removes: 0.3."
)
@click.option(
    "--distill", "epochs", type=click.IntRange(min=1), metavar="EPOCHS", help="Train to answer as the original."
)
@click.option("--quantize", "scheme", metavar="FORMAT", help="w8a8, w8a16, w4a16:32, int4, fixed:256.")
@click.option("--teacher", metavar="MODEL", help="What to distil from. [default: the model itself]")
@target_options(required=False)
@saving_options
@class_option
def compress_command(
    terminal: Terminal,
    model: str,
    data_name: str | None,
    recipe: Path | None,
    fraction: float | None,
    pattern: str | None,
    criterion: str | None,
    low_rank: float | None,
    epochs: int | None,
    scheme: str | None,
    teacher: str | None,
    target_name: str | None,
    precision: str | None,
    threads: int | None,
    seed: int,
    out: Path,
    run_dir: Path | None,
    class_name: str | None,
) -> None:
    """Run steps in the order prune, factorize, distill, quantize; or those of a recipe.

    With --target, the model before and after is exported, judged and timed there. Stopped at any time, the same command
    goes on where it was.
    """
    from gracile.compress import compress
    from gracile.inputs import load_data, load_model
    from gracile.result import check_destination

    asked = {
        "--prune": fraction,
        "--pattern": pattern,
        "--criterion": criterion,
        "--factorize": low_rank,
        "--distill": epochs,
        "--quantize": scheme,
    }
    if recipe is not None:
        others = [name for name, value in asked.items() if value is not None]
        if others:
            raise click.UsageError(f"--recipe holds all steps; leave out {', '.join(others)}.")
        step = read_recipe(recipe)
    else:
        step = steps_from(fraction, pattern, criterion, low_rank, epochs, scheme)
    target = usable_target(target_name, precision, threads) if target_name is not None else None
    check_destination(out)
    network, data = load_model(model, class_name), load_data(data_name) if data_name is not None else None
    guide = load_model(teacher) if teacher is not None else None
    terminal.run_dir = run_directory_of(out, run_dir)
    with terminal.progress() as on_progress:
        result = compress(
            network,
            step,
            data,
            teacher=guide,
            target=target,
            seed=seed,
            run_dir=terminal.run_dir,
            on_progress=on_progress,
        )
    save_and_show(terminal, result, out, terminal.run_dir)


def steps_from(
    fraction: float | None,
    pattern: str | None,
    criterion: str | None,
    low_rank: float | None,
    epochs: int | None,
    scheme: str | None,
) -> Step:
    """The steps that the options ask for; raises UsageError for none."""
    from gracile.criteria import Magnitude
    from gracile.patterns import NM, Unstructured
    from gracile.recipe import Recipe
    from gracile.recipe_json import scheme_named
    from gracile.steps import Distill, Factorize, Prune, Quantize

    cut = make_pattern(pattern) if pattern is not None else Unstructured()
    steps: list[Step] = []
    if fraction is not None or isinstance(cut, NM):
        steps.append(
            Prune(fraction, criterion=make_criterion(criterion) if criterion is not None else Magnitude(), pattern=cut)
        )
    elif pattern is not None or criterion is not None:
        raise click.UsageError("--pattern and --criterion say what to prune; say how much: --prune 0.3.")
    if low_rank is not None:
        steps.append(Factorize(low_rank))
    if epochs is not None:
        steps.append(Distill(epochs=epochs))
    if scheme is not None:
        steps.append(Quantize(scheme_named(scheme)))
    if not steps:
        raise click.UsageError("Nothing to do. Give --prune, --factorize, --distill, --quantize or --recipe.")
    return steps[0] if len(steps) == 1 else Recipe(*steps)


def read_recipe(path: Path) -> Step:
    """The step in a JSON file; raises ConfigError."""
    from gracile.recipe_json import recipe_from_json

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"The recipe '{path}' cannot be read: {error}.") from error
    return recipe_from_json(config)
