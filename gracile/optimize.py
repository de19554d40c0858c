"""optimize: the recipe that serves a goal, found by measuring on the target that will serve the model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gracile.check import check_request, check_seed
from gracile.compress import become
from gracile.context import Progress, derive_seed
from gracile.data import Data
from gracile.errors import ConfigError, DataError, TargetError
from gracile.goal import Goal
from gracile.result import Result
from gracile.search import Search


def optimize(
    model: nn.Module,
    data: Data,
    goal: Goal,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    inplace: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The smallest model by the goal's objective whose measured quality and cost keep the goal's limits.

    The original is measured on the target; then which of the target's precision modes, integers, and fewer units it
    really runs faster; then candidates are made, cheapest first, each pruned to a width found by bisection on measured
    latency, distilled where there are training data, quantized, exported and judged there. The best that meets every
    limit is returned; if none does, the nearest miss, with `met` False and the reason in the report.

    data: needs `evaluation` and `metric`; with `train`, candidates are distilled. Other arguments as in `compress`.
    Raises a GracileError before anything is changed.
    """
    check_seed(seed)
    check_request(model, data, teacher)
    if not isinstance(goal, Goal):
        raise ConfigError(f"optimize: expected a gracile.Goal, got a {type(goal).__name__}.")
    if data.evaluation is None or data.metric is None:
        raise DataError(
            "optimize judges quality.\n  Pass Data(evaluation=labelled_batches, metric=gracile.metrics.accuracy)."
        )
    missing = goal.target.available()
    if missing is not None:
        raise TargetError(f"The target {goal.target.name} cannot be used here: {missing}")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(derive_seed(seed, "optimize"))  # loaders draw from the global state; the caller's is kept
        folder = Path(run_dir) if run_dir is not None else Path(temporary)
        search = Search(model, data, goal, teacher, seed, folder, on_progress)
        result = search.run()
        if run_dir is None:
            result = replace(result, exported=_keep_exported(result))
    if inplace:
        become(model, result.model, result.edits)
        return replace(result, model=model)
    return result


def _keep_exported(result: Result) -> dict[str, Path]:
    """Exported files moved where they outlive the search's temporary directory."""
    kept = {}
    for name, path in result.exported.items():
        folder = Path(tempfile.mkdtemp(prefix="gracile-"))
        for file in path.parent.glob(f"{path.stem}.*"):
            shutil.copy2(file, folder / file.name)
        kept[name] = folder / path.name
    return kept
