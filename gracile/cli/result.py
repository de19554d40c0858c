"""What `optimize`, `compress` and `demo` show of a result, and where they save it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gracile.cli.terminal import Terminal

if TYPE_CHECKING:
    from gracile.report.model import Report
    from gracile.result import Result


def save_and_show(terminal: Terminal, result: Result, out: Path, run_dir: Path | None) -> None:
    """Save the artifact, then show the report's table and where the page is."""
    result.save(out)
    places = {"artifact": str(out), "html": str(out / "report.html")}
    if run_dir is not None:
        places["run_dir"] = str(run_dir)
    data = {"met": result.met, **places, "summary": result.report.summary(), "report": report_data(result.report)}
    terminal.show(report_view(result.report, out), data)


def report_view(report: Report, directory: Path) -> Any:
    """The report's table, and where the model and the page are."""
    from rich.console import Group
    from rich.text import Text

    from gracile.report.terminal import render

    lines: list[Any] = [render(report), Text()]
    if (directory / "model.safetensors").is_file():
        lines.append(Text(f"Model:  {directory}", no_wrap=True, overflow="ignore"))
    if (directory / "report.html").is_file():
        lines.append(Text(f"Report: {directory / 'report.html'}", no_wrap=True, overflow="ignore"))
    return Group(*lines)


def report_data(report: Report) -> dict[str, Any]:
    """The report as JSON data, without the edits, which the artifact has."""
    data = report.to_json()
    return {**data, "steps": [{k: v for k, v in step.items() if k != "edits"} for step in data["steps"]]}
