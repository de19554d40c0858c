"""gracile report: a saved report again."""

from __future__ import annotations

from pathlib import Path

import click

from gracile.cli.command import command
from gracile.cli.result import report_data, report_view
from gracile.cli.terminal import Terminal


@command("report")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def report(terminal: Terminal, directory: Path, opens: bool) -> None:
    """Show the report saved in DIRECTORY, and where its page is."""
    from gracile.report.model import Report

    found = Report.load(directory)
    folder = directory if directory.is_dir() else directory.parent
    page = folder / "report.html"
    data = {"html": str(page) if page.is_file() else None, "report": report_data(found)}
    terminal.show(report_view(found, folder), data)
    if opens and page.is_file() and click.launch(page.resolve().as_uri()) != 0:
        terminal.say(f"No browser could be started. The page is {page.resolve()}.")
