"""gracile evaluate: quality with its interval."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gracile.cli.command import command
from gracile.cli.options import class_option, data_option, model_argument, target_options, usable_target
from gracile.cli.terminal import Terminal
from gracile.errors import DataError


@command("evaluate")
@model_argument
@data_option(required=True)
@target_options(required=False)
@class_option
def evaluate(
    terminal: Terminal,
    model: str,
    data_name: str,
    target_name: str | None,
    precision: str | None,
    threads: int | None,
    class_name: str | None,
) -> None:
    """Measure quality on the evaluation data, in PyTorch or on a target, with its 95 % interval; size and MACs too."""
    from gracile.check import check_request
    from gracile.inputs import load_data, load_model
    from gracile.measure import Subject, measure
    from gracile.report.plain import encode

    target = usable_target(target_name, precision, threads) if target_name is not None else None
    network, data = load_model(model, class_name), load_data(data_name)
    if data.evaluation is None or data.metric is None:
        raise DataError(
            "There is nothing to judge by.\n  Return Data(evaluation=batches, metric=gracile.metrics.accuracy)."
        )
    check_request(network, data)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure([Subject(model, network, target)], data, Path(folder))[0]
    found = encode(measured.measurements[0])
    terminal.show(_view(model, found), found)


def _view(model: str, found: dict[str, Any]) -> Any:
    from rich.table import Table

    from gracile.report.text import show_bytes, show_count, show_ms

    quality = found["quality"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("Model", model)
    table.add_row("Runs on", f"{found['target']} ({found['precision']})")
    interval = f"95 % interval {quality['low']:.4f} to {quality['high']:.4f}, {quality['examples']:,} examples"
    table.add_row(quality["name"][:1].upper() + quality["name"][1:], f"{quality['value']:.4f}   {interval}")
    for name, key, show in (
        ("Latency, median", "latency_p50_ms", show_ms),
        ("Model file", "file_bytes", show_bytes),
        ("Parameters", "parameters", show_count),
        ("MACs per example", "macs", show_count),
    ):
        if found[key] is not None:
            batch = f", batch {found['batch_size']}" if key == "latency_p50_ms" else ""
            table.add_row(name, f"{show(found[key])}{batch}")
    return table
