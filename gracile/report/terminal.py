"""The report in a terminal: verdict, a table before -> after, and what was skipped."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from gracile.report.model import Report
from gracile.report.view import Pair, Row, comparisons, outcome, skipped_by_reason

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

#: Width of the plain text form, which must not depend on the terminal it is made in.
TEXT_WIDTH = 100


def render(report: Report) -> RenderableType:
    """The report as rich renderables: a table for each pair measured, the verdict, and what was skipped and why."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(report.title, style="bold")]
    for pair, shown in comparisons(report):
        parts += [Text(), _table(pair, shown)]
    parts += [Text(), _verdict(report)]
    if report.reason:
        parts.append(Text(f"Why it ended here: {report.reason}", style="dim"))
    if report.skipped:
        parts += [Text(), *_skipped(report)]
    return Group(*parts)


def render_text(report: Report) -> str:
    """The same as plain text, without colours."""
    from rich.console import Console

    console = Console(file=StringIO(), width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(pair: Pair, shown: list[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(pair.title), title_justify="left", pad_edge=False)
    table.add_column("")
    for heading, measurement in (("before", pair.before), ("after", pair.after)):
        elsewhere = "" if measurement.target == pair.after.target else f"{measurement.target} "
        table.add_column(Text(f"{heading} ({elsewhere}{measurement.precision})"), justify="right")
    table.add_column("change", justify="right")
    for row in shown:
        style = {True: "green", False: "yellow", None: "dim"}[row.better]
        table.add_row(Text(row.name), Text(row.before), Text(row.after), Text(row.change, style=style))
    return table


def _verdict(report: Report) -> RenderableType:
    from rich.text import Text

    style = {True: "bold green", False: "bold yellow", None: "bold"}[report.met]
    text = Text(outcome(report) if report.met is not None else "Result", style=style)
    return text.append(f": {report.verdict}" if report.verdict else "", style="default not bold")


def _skipped(report: Report, most: int = 5) -> list[RenderableType]:
    from rich.text import Text

    reasons = skipped_by_reason(report)
    lines: list[RenderableType] = [Text(f"Skipped: {sum(len(names) for _, names in reasons)} layers", style="bold")]
    for reason, names in reasons[:most]:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(Text(f"  {len(names)} × {reason}: {listed}"))
    if len(reasons) > most:
        lines.append(Text(f"  and {len(reasons) - most} more reasons, in the report"))
    return lines
