"""gracile bench: one model on several runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gracile.cli.command import command
from gracile.cli.options import class_option, data_option, make_target, model_argument
from gracile.cli.terminal import Terminal
from gracile.context import Progress
from gracile.errors import TargetError

if TYPE_CHECKING:
    from torch import nn

    from gracile.data import Data


@command("bench")
@model_argument
@data_option(required=True, help="Factory that returns gracile.Data; its first batch is fed.")
@click.option("--targets", help="Such as onnxruntime,openvino,openvino:default,pytorch. [default: all installed]")
@click.option("--batch-sizes", default="1,32", show_default=True, help="Batch sizes to time.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every runtime. [default: its own choice]")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="For each batch size.")
@class_option
def bench(
    terminal: Terminal,
    model: str,
    data_name: str,
    targets: str | None,
    batch_sizes: str,
    threads: int | None,
    seconds: float,
    class_name: str | None,
) -> None:
    """Time one model on several runtimes, in turn and in one process; ratios are to the first."""
    from gracile.check import check_request
    from gracile.inputs import load_data, load_model

    sizes = parse_sizes(batch_sizes)
    chosen = choose_targets(targets, threads)
    network, data = load_model(model, class_name), load_data(data_name)
    check_request(network, data)
    with terminal.progress() as on_progress:
        rows = time_targets(network, data, chosen, sizes, seconds, on_progress)
    terminal.show(_view(rows), rows)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from "1,32"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"'{text}': expected whole numbers from 1, such as 1,32.", param_hint="--batch-sizes")
    return tuple(dict.fromkeys(int(part) for part in parts))


def choose_targets(names: str | None, threads: int | None) -> dict[str, Any]:
    """Targets by name; with none named, all that are installed. Raises TargetError for a named one that is not."""
    if names is None:
        every = ("onnxruntime", "openvino", "openvino:default", "pytorch")
        found = {name: make_target(name, threads=threads) for name in every}
        return {name: target for name, target in found.items() if target.available() is None}
    found = {name.strip(): make_target(name.strip(), threads=threads) for name in names.split(",")}
    for target in found.values():
        missing = target.available()
        if missing is not None:
            raise TargetError(f"The target {target.name} cannot be used here: {missing}")
    return found


def time_targets(
    model: nn.Module,
    data: Data,
    targets: dict[str, Any],
    sizes: Sequence[int],
    seconds: float,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[dict[str, Any]]:
    """Latency of the model on every target at every batch size, as rows of plain data; interleaved at each size."""
    import torch

    from gracile.evaluate.latency import measure_latency
    from gracile.measure import example_batch, resize_batch

    def tell(phase: str, done: int, total: int, note: str) -> None:
        if on_progress is not None:
            on_progress(Progress(phase, done, total, note))

    example = example_batch(data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for index, (name, target) in enumerate(targets.items()):
            tell("export", index, len(targets), name)
            path = Path(folder) / str(index) / f"model{target.suffix}"
            path.parent.mkdir()
            loaded[name] = target.load(target.export(model, example, path, feed=data.feed))
        tell("export", len(targets), len(targets), "")
        for index, size in enumerate(sizes):
            tell("time", index, len(sizes), f"batch {size}")
            batch = resize_batch(example, size)
            fed = data.feed(batch) if data.feed is not None else batch
            calls = {name: _call(runner, fed) for name, runner in loaded.items()}
            precisions = {name: str(getattr(target, "precision", "f32")) for name, target in targets.items()}
            with torch.inference_mode():
                latencies = measure_latency(calls, seconds=seconds, precision=precisions, batch_size=size)
            for name, latency in latencies.items():
                own = getattr(targets[name], "threads", None)
                rows.append({"target": name, **latency.to_json(), "threads": own})
        tell("time", len(sizes), len(sizes), "")
    return rows


def _call(runner: Callable[[Any], Any], batch: Any) -> Callable[[], Any]:
    return lambda: runner(batch)


def _view(rows: Sequence[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(f"Latency of one batch; processor: {rows[0]['instruction_set']}; ratios to {rows[0]['target']}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in ("target", "precision", "threads", "batch", "median ms", "95th ms", "times as fast", "interval"):
        table.add_column(heading, justify="left" if heading in ("target", "precision") else "right")
    previous = rows[0]["batch_size"]
    for row in rows:
        if row["batch_size"] != previous:
            table.add_section()
            previous = row["batch_size"]
        table.add_row(
            row["target"],
            row["precision"],
            "all" if row["threads"] is None else str(row["threads"]),
            str(row["batch_size"]),
            f"{row['p50_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['ratio']:.2f}×",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        )
    return table
