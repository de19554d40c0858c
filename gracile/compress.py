"""compress: run a recipe on a copy of a model, step by step with checkpoints, and measure before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracile.check import check_request, check_seed, copy_of
from gracile.config import to_config
from gracile.context import Context, Progress, derive_seed
from gracile.data import Data
from gracile.environment import describe_environment
from gracile.errors import ConfigError, TargetError
from gracile.evaluate.behaviour import behaviour
from gracile.evaluate.quality import compare
from gracile.goal import check_target
from gracile.measure import Measured, Subject, measure
from gracile.pretrained import configured_sizes
from gracile.recipe import Step
from gracile.report.model import Report, StepRecord
from gracile.report.plain import plain
from gracile.result import Result
from gracile.run_directory import RunDirectory, fingerprint_data, fingerprint_model
from gracile.sharing import own_parameters, share_parameters
from gracile.stats.collect import first_batch
from gracile.surgery import Edit, Swap, apply


def compress(
    model: nn.Module,
    step: Step,
    data: Data | None = None,
    *,
    teacher: nn.Module | None = None,
    target: Any = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    inplace: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The model after a step or recipe, with the evidence of what it cost; the model given is not touched.

    data: what the steps calibrate and train on, and what quality is measured on. None: no data, for steps that need
        none.
    teacher: what Distill learns from; None: the model itself as it is now.
    target: a runtime on which before and after are exported, judged and timed. None: judged in PyTorch, not timed.
    seed: of all randomness; the same seed gives the same weights.
    run_dir: a directory in which every finished step is kept, and in it every epoch and every layer that a solver has
        rounded; the same call goes on there after a kill.
    inplace: change the model given instead of a copy, once all steps are done.

    Raises a GracileError before anything is changed if the model, data or settings cannot work together.
    """
    if not isinstance(step, Step):
        raise ConfigError(f"compress: {step!r} is not a step.\n  Pass Prune(0.3), Quantize(W8A8), Recipe(...), ...")
    data = data if data is not None else Data()
    check_seed(seed)
    check_request(model, data, teacher)
    if target is not None:
        check_target(target, "compress(target=...)")
        missing = target.available()
        if missing is not None:
            raise TargetError(f"The target {target.name} cannot be used here: {missing}")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(derive_seed(seed, "compress"))  # loaders draw from the global state; the caller's is kept
        compressed, edits, records, original = run_steps(
            model,
            step,
            data,
            teacher=teacher,
            target=target,
            seed=seed,
            run_dir=run_dir,
            inplace=inplace,
            on_progress=on_progress,
        )
        folder = Path(run_dir) / "measured" if run_dir is not None else Path(temporary)
        before, after = measure_both(original, compressed, data, target, folder, seed, on_progress)
        report = replace(
            report_of(before, after, data, seed=seed),
            title=f"{type(model).__name__}: {step.title}",
            steps=tuple(records),
        )
        provenance = provenance_of(step, data, seed)
    exported = {}
    if target is not None and run_dir is not None and after is not None and after.path is not None:
        exported = {target.name: after.path}
    return Result(compressed, report, None, tuple(edits), provenance, exported)


def run_steps(
    model: nn.Module,
    step: Step,
    data: Data,
    *,
    teacher: nn.Module | None,
    target: Any,
    seed: int,
    run_dir: str | Path | None,
    inplace: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[nn.Module, list[Edit], list[StepRecord], nn.Module]:
    """Run the steps, or take finished ones from the run directory: compressed model, edits, records, original.

    The original reads the parameters of the model given, and so does the compressed one until a step writes into them;
    what is returned has its own. A model to be changed in place is copied: the original must outlive that.
    """
    original = copy_of(model, share=not inplace).eval()
    for p in original.parameters():
        p.requires_grad_(False)
    work = share_parameters(model)  # of a model to be changed in place too: a step that fails must leave it whole
    context = Context(
        data=data,
        original=original,
        teacher=teacher or original,
        seed=seed,
        run_seed=seed,
        target=target,
        on_progress=on_progress,
    )
    todo = step.leaves()
    for planned in todo:
        planned.check(work, context)
    run = None
    if run_dir is not None:
        identity = {"model": fingerprint_model(original), "recipe": to_config(step), "seed": seed}
        run = RunDirectory(run_dir, identity | {"data": fingerprint_data(data)})
    edits: list[Edit] = list(getattr(model, "gracile_edits", ()))  # of an earlier compression, if it was loaded
    records: list[StepRecord] = []
    done = run.finished_steps() if run is not None else 0
    if run is not None and done:
        own_parameters(work, model)
        edits, records = run.restore(done - 1, work)
    for index in range(done, len(todo)):
        context.progress("step", index, len(todo), todo[index].title)
        directory = run.step_directory(index) if run is not None else None
        if not todo[index].replaces_tensors:
            own_parameters(work, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "step", index))
            record = todo[index](work, replace(context, directory=directory, seed=derive_seed(seed, index)))
        edits.extend(record.edits)
        records.append(record)
        if run is not None:
            run.finish_step(index, work, edits, records)
    context.progress("step", len(todo), len(todo))
    own_parameters(work, model)
    cut = any(record.edits for record in records)
    if cut and not any(isinstance(edit, Swap) for edit in edits):
        configured, notes = configured_sizes(work, lambda net: data.forward(net, first_batch(data)))
        apply(work, configured)
        edits.extend(configured)
        records[-1] = replace(records[-1], notes=(*records[-1].notes, *notes))
    if inplace:
        become(model, work, edits)
        work = model
    work.gracile_edits = tuple(edits)  # type: ignore[assignment]
    return work, edits, records, original


def become(model: nn.Module, compressed: nn.Module, edits: Sequence[Edit]) -> None:
    """Give the model the structure and weights of a compressed copy of it.

    edits: all of the compressed one, including those that the model had already.
    """
    apply(model, edits[len(getattr(model, "gracile_edits", ())) :])
    model.load_state_dict(compressed.state_dict())
    model.gracile_edits = tuple(edits)  # type: ignore[assignment]


def measure_both(
    original: nn.Module,
    compressed: nn.Module,
    data: Data,
    target: Any,
    folder: Path,
    seed: int,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[Measured | None, Measured | None]:
    """Both models on the target (None: in PyTorch, without latency); nothing where there are no data to run them on."""
    if data.evaluation is None and not data.has_calibration:
        return None, None

    def tell(phase: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(Progress(phase, done, total))

    subjects = [Subject("original", original, target), Subject("compressed", compressed, target)]
    before, after = measure(subjects, data, folder, batch_sizes=(None, 1), seed=seed, on_progress=tell)
    return before, after


def report_of(
    before: Measured | None,
    after: Measured | None,
    data: Data,
    *,
    seed: int,
    max_drop: float = float("inf"),
    confidence: float = 0.95,
) -> Report:
    """The report's measurements, comparison, behaviour, parity and environment."""
    report = Report(
        title="",
        seed=seed,
        environment=describe_environment(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    if before is None or after is None:
        return replace(report, verdict="Not measured: no data to run the model on.")
    report = replace(
        report,
        before=before.measurements,
        after=after.measurements,
        parity=tuple(m.parity for m in (before, after) if m.parity is not None),
    )
    if data.metric is None or before.values is None or after.values is None or data.evaluation is None:
        return replace(report, verdict="Quality was not measured: no evaluation data.")
    comparison = compare(data.metric, before.values, after.values, max_drop=max_drop, confidence=confidence, seed=seed)
    return replace(
        report,
        comparison=plain(comparison),
        behaviour=plain(behaviour(before.predict, after.predict, data.evaluation)),
        verdict=comparison.verdict,
    )


def provenance_of(step: Step | None, data: Data, seed: int) -> dict[str, Any]:
    """Where an artifact comes from: recipe, seed, versions and a fingerprint of the data."""
    from gracile.version import __version__

    return {
        "recipe": to_config(step),
        "seed": seed,
        "versions": {"gracile": __version__, "torch": torch.__version__},
        "data": fingerprint_data(data),
    }
