"""gracile inspect: layers, costs, and what can be cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from gracile.cli.command import command
from gracile.cli.options import class_option, data_option, model_argument
from gracile.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from gracile.inspection import GroupView, Inspection
    from gracile.sensitivity import Sensitivity

#: Tied axes listed for one group; --json lists all.
MOST = 4
#: Characters of the longest bar.
BAR = 24


@command("inspect")
@model_argument
@data_option(required=False, help="Factory that returns gracile.Data; without it only layers and parameters are known.")
@class_option
@click.option(
    "--sensitivity",
    metavar="SCHEMES",
    help="Instead: how far the outputs move with one layer alone in few bits, e.g. w8a8,w4a8,w2a8. Needs --data.",
)
def inspect_command(
    terminal: Terminal, model: str, data_name: str | None, class_name: str | None, sensitivity: str | None
) -> None:
    """Show layers, shapes, parameters and MACs, which axes are tied, and which are frozen and why."""
    from gracile.inputs import load_data, load_model
    from gracile.inspection import inspect_model

    network = load_model(model, class_name)
    if sensitivity is not None:
        _show_sensitivity(terminal, network, data_name, sensitivity)
        return
    found = inspect_model(network, load_data(data_name) if data_name is not None else None)
    terminal.show(_view(found), found.to_json())
    if data_name is None and not terminal.json:
        terminal.say("Shapes, MACs and what can be cut show when the model runs: pass --data.")


def _show_sensitivity(terminal: Terminal, network: Any, data_name: str | None, schemes: str) -> None:
    from gracile.inputs import load_data
    from gracile.recipe_json import scheme_named
    from gracile.sensitivity import measure_sensitivity

    if data_name is None:
        raise click.UsageError("--sensitivity runs the model: pass --data.")
    options = [scheme_named(name) for name in schemes.split(",")]
    if len(options) < 2:
        raise click.UsageError("--sensitivity compares two schemes or more, such as w8a8,w4a8.")
    found = measure_sensitivity(network, load_data(data_name), options)
    terminal.show(_sensitivity(found), found.to_json())


def _sensitivity(found: Sensitivity) -> Table:
    """A row for each layer, and a bar for its loss in the last scheme, on a logarithmic scale over all layers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from gracile.report.text import show_count

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "kind", "parameters", *found.schemes, found.schemes[-1]):
        table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
    table.columns[-1].justify = "left"
    last = [max(layer.losses[-1], 1e-30) for layer in found.layers]
    low, high = math.log(min(last)), math.log(max(last))
    for layer, loss in zip(found.layers, last):
        bar = "█" * (1 + round((BAR - 1) * (math.log(loss) - low) / max(high - low, 1e-9)))
        numbers = [f"{value:.3g}" for value in layer.losses]
        table.add_row(Text(layer.name), Text(layer.kind), show_count(layer.parameters), *numbers, bar)
    return table


def _view(found: Inspection) -> Any:
    from rich.console import Group
    from rich.text import Text

    from gracile.report.text import show_bytes, show_count

    totals = f"{found.model}: {show_count(found.parameters)} parameters, {show_bytes(found.state_bytes)}"
    if found.zeros:
        totals += f", {found.zeros / found.parameters:.1%} of them zero"
    if found.macs is not None:
        totals += f", {show_count(found.macs)} MACs per example"
    parts: list[Any] = [Text(totals, style="bold"), _layers(found)]
    free = [group for group in found.groups if group.frozen is None]
    if free:
        parts += [Text("Units that can be cut, with every axis they are tied to", style="bold"), _groups(free)]
    if found.frozen_by_reason:
        parts.append(Text("Frozen, and why", style="bold"))
        parts += [Text(f"  {reason}: {_listed(names)}") for reason, names in found.frozen_by_reason]
    if found.unknown_operators:
        parts.append(
            Text(f"Operators without a rule (axes they touch are frozen): {', '.join(found.unknown_operators)}")
        )
    return Group(*parts)


def _layers(found: Inspection) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from gracile.report.text import show_count

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "kind", "input", "output", "parameters", "MACs", "calls"):
        table.add_column(heading, justify="right" if heading in ("parameters", "MACs", "calls") else "left")
    for layer in found.layers:
        macs = show_count(layer.macs) if layer.macs is not None else "–"
        calls = str(layer.calls) if layer.calls is not None else "–"
        shapes = [_shape(layer.input_shape), _shape(layer.output_shape)]
        name = layer.name or "(the model itself)"
        table.add_row(Text(name), Text(layer.kind), *shapes, show_count(layer.parameters), macs, calls)
    return table


def _groups(groups: list[GroupView]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("group", "units", "made by", "read by", "remark"):
        table.add_column(heading, justify="right" if heading == "units" else "left")
    for group in groups:
        remarks = [f"cutting differs from zeroing: {group.exact}"] if group.exact else []
        remarks += ["same count as the others with it"] if group.tied_count else []
        table.add_row(
            Text(group.name),
            Text(f"{group.units} {group.kind}"),
            Text(_listed(group.producers)),
            Text(_listed(group.consumers)),
            Text("; ".join(remarks)),
        )
    return table


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _shape(shape: tuple[int, ...] | None) -> str:
    return " × ".join(map(str, shape)) if shape is not None else "–"
