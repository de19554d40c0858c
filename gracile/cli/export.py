"""gracile export: a model as its runtime takes it, with proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gracile.cli.command import command
from gracile.cli.options import class_option, data_option, model_argument, target_options, usable_target
from gracile.cli.terminal import Terminal


@command("export")
@model_argument
@data_option(required=True, help="Factory that returns gracile.Data; its first batch is the example.")
@target_options(required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@class_option
def export_command(
    terminal: Terminal,
    model: str,
    data_name: str,
    target_name: str,
    precision: str | None,
    threads: int | None,
    out: Path,
    class_name: str | None,
) -> None:
    """Write the model for a runtime, and compare outputs and latency there with PyTorch's."""
    from gracile.check import check_request
    from gracile.export import export
    from gracile.inputs import load_data, load_model
    from gracile.measure import example_batch

    target = usable_target(target_name, precision, threads)
    network, data = load_model(model, class_name), load_data(data_name)
    check_request(network, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    evidence = export(network, target, out, example_batch(data), data).to_json()
    terminal.show(_view(evidence), evidence)


def _view(evidence: dict[str, Any]) -> Any:
    from rich.table import Table

    from gracile.report.text import show_bytes

    parity, latency = evidence["parity"], evidence["latency"]
    here = latency[evidence["target"]]
    error = (
        f"at most {parity['max_error']:.3g}, mean {parity['mean_error']:.3g}, of outputs up to {parity['scale']:.3g}"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("File", evidence["path"])
    table.add_row("Size", show_bytes(evidence["size_bytes"]))
    table.add_row("Differs from PyTorch", error)
    if parity["agreement"] is not None:
        table.add_row("Same predictions", f"{parity['agreement']:.2%}")
    for name, found in latency.items():
        table.add_row(
            f"Latency in {name}", f"{found['p50_ms']:.3f} ms median, {found['p95_ms']:.3f} ms 95th percentile"
        )
    table.add_row("Faster than PyTorch", f"{here['ratio']:.2f}× ({here['ratio_low']:.2f} to {here['ratio_high']:.2f})")
    for note in evidence.get("notes", ()):
        table.add_row("Note", note)
    return table
