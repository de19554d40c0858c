"""The report as one self-contained HTML page: no network, light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from datetime import datetime
from importlib.resources import files
from typing import Any

from gracile.report import plots, view
from gracile.report.model import Measurement, Report
from gracile.report.text import (
    ABSENT,
    digits,
    is_number,
    show_any,
    show_bytes,
    show_ms,
    show_name,
    show_quality,
    show_ratio,
    show_seconds,
)

WIDE, NARROW = 960, 340  # pixels at which a plot is drawn for a wide page and for a phone


def render_html(report: Report) -> str:
    """The page as text. Every string of the report is escaped; a part of which nothing is known is left out."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("gracile.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        any=show_any, name=show_name, seconds=show_seconds, bytes=show_bytes, ms=show_ms, digits=digits
    )
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(here.joinpath("template.html").read_text(encoding="utf-8")).render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        **_context(report),
    )


def render_notebook(report: Report) -> str:
    """The page inside a frame of its own, for a notebook's cell."""
    page = html.escape(render_html(report), quote=True)
    return (
        f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Gracile report" '
        f'style="width:100%;height:720px;border:0"></iframe>'
    )


def _context(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    def safe(svg: str | None) -> Markup | None:
        return None if svg is None else Markup(svg)

    pairs = view.pairs(report)
    layers = view.layers(report)
    behaviour = report.behaviour or {}
    percent = view.in_percent(report)
    return {
        "report": report,
        "outcome": view.outcome(report),
        "verdict": report.verdict[:1].upper() + report.verdict[1:],
        "created": _date(report.created),
        "metric": view.metric_name(report),
        "comparisons": view.comparisons(report),
        "cards": _cards(pairs, report),
        "measurements": _measurements(report, pairs) if len(report.before) + len(report.after) > 2 else [],
        "candidates": [
            {
                "label": c.label,
                "quality": show_quality(c.quality, percent) if is_number(c.quality) else ABSENT,
                "latency": show_ms(c.latency_ms) if is_number(c.latency_ms) else ABSENT,
                "bytes": show_bytes(c.file_bytes) if is_number(c.file_bytes) else ABSENT,
                "met": {True: "met", False: "missed", None: ABSENT}[c.met],
                "reason": c.reason,
            }
            for c in report.candidates
        ],
        "candidate_plots": [(size, safe(plots.candidates(report, size))) for size in (WIDE, NARROW)],
        "layers": layers,
        "layer_columns": {
            field: any(getattr(row, field) is not None for row in layers)
            for field in ("kept", "bits", "format", "range", "sparsity", "error")
        },
        "layer_plots": [(size, safe(plots.layer_bars(layers, size))) for size in (WIDE, NARROW)],
        "latency_plots": [(size, safe(plots.latencies(report, size))) for size in (WIDE, NARROW)],
        "skipped": view.skipped_by_reason(report),
        "behaviour": behaviour,
        "flip_plot": safe(plots.flips(behaviour)) if behaviour else None,
        "reliability_plot": safe(plots.reliability(behaviour)) if behaviour else None,
        "figures": _behaviour_figures(behaviour),
        "parity_columns": list(dict.fromkeys(key for row in report.parity for key in row)),
        "environment": _flat(report.environment),
        "goal": _flat(report.goal or {}),
        "recipe": json.dumps([step.step for step in report.steps], indent=2, ensure_ascii=False),
    }


def _cards(pairs: list[view.Pair], report: Report) -> list[view.Row]:
    """The figures that a reader looks for first, of the first pair."""
    if not pairs:
        return []
    wanted = (view.metric_name(report), "Latency, median", "Model file", "MACs per example")
    rows = {row.name: row for row in view.rows(pairs[0], report)}
    return [rows[name] for name in wanted if name in rows]


def _measurements(report: Report, pairs: list[view.Pair]) -> list[dict[str, str]]:
    """Every measurement as a line of text, those after with the ratio to what they are judged against."""
    against = {id(pair.after): pair.before for pair in pairs}
    percent = view.in_percent(report)

    def line(m: Measurement, when: str) -> dict[str, str]:
        before = against.get(id(m))
        ratio = ABSENT
        if before is not None and is_number(before.latency_p50_ms) and is_number(m.latency_p50_ms):
            ratio = show_ratio(before.latency_p50_ms, m.latency_p50_ms, "faster", "slower")
        value = (m.quality or {}).get("value")
        return {
            "Model": f"{m.label} ({when})" if m.label != when else when,
            "Target": m.target,
            "Precision": m.precision,
            "Batch": show_any(m.batch_size),
            "Threads": show_any(m.threads),
            "Median": show_ms(m.latency_p50_ms) if is_number(m.latency_p50_ms) else ABSENT,
            "p95": show_ms(m.latency_p95_ms) if is_number(m.latency_p95_ms) else ABSENT,
            "Speed": ratio,
            view.metric_name(report): show_quality(value, percent) if is_number(value) else ABSENT,
            "File": show_bytes(m.file_bytes) if is_number(m.file_bytes) else ABSENT,
            "Instructions": show_any(m.instruction_set),
        }

    lines = [line(m, "before") for m in report.before] + [line(m, "after") for m in report.after]
    known = [key for key in lines[0] if any(row[key] != ABSENT for row in lines)]
    return [{key: row[key] for key in known} for row in lines]


def _behaviour_figures(behaviour: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of calibration, or (name, "", value) of a number that compares the two models."""
    figures: list[tuple[str, str, str]] = []
    for key, name in (("ece", "Calibration error (ECE)"), ("brier", "Brier score"), ("nll", "Negative log-likelihood")):
        sides = [behaviour.get(side) for side in ("before", "after")]
        if all(isinstance(side, dict) and is_number(side.get(key)) for side in sides):
            first, second = (digits(side[key]) for side in sides if side is not None)
            figures.append((name, first, second))
    for key, name in (
        ("kl", "KL divergence, before to after (nats)"),
        ("relative_error", "Relative error of the outputs"),
        ("largest_error", "Largest absolute error"),
        ("cosine", "Mean cosine similarity"),
    ):
        if is_number(behaviour.get(key)):
            figures.append((name, "", digits(behaviour[key])))
    return figures


def _date(created: str) -> str:
    """The time as a person reads it; as it is where it is not ISO 8601."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".rstrip()


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as (label, text) lines."""
    lines: list[tuple[str, str]] = []
    for key, value in data.items():
        label = f"{prefix}{show_name(str(key)) if not prefix else key}"
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{label}: ")
        else:
            lines.append((label, show_any(value)))
    return lines
