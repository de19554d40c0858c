"""gracile doctor: what works here, and what is missing."""

from __future__ import annotations

from dataclasses import asdict

from gracile.cli.command import command
from gracile.cli.terminal import Terminal

MARKS = {"ok": ("ok", "green"), "absent": ("absent", "dim"), "warning": ("warning", "yellow")}


@command("doctor")
def doctor_command(terminal: Terminal) -> None:
    """Show versions, processor, runtimes and extras, known bad pairs, and what each would give."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from gracile.environment import doctor

    findings = doctor()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "state", "what is there", "what it gives"):
        table.add_column(heading)
    for finding in findings:
        word, style = MARKS[finding.state]
        table.add_row(Text(finding.name), Text(word, style=style), Text(finding.detail), Text(finding.gives))
    terminal.show(table, [asdict(finding) for finding in findings])
