"""What of a report is shown, in which order and words: shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gracile.report.model import LayerRow, Measurement, Report
from gracile.report.text import (
    ABSENT,
    digits,
    is_number,
    show_bytes,
    show_count,
    show_difference,
    show_ms,
    show_quality,
    show_ratio,
)


@dataclass(frozen=True)
class Pair:
    """A compressed model's measurement and the original's that it is judged against."""

    before: Measurement
    after: Measurement

    @property
    def title(self) -> str:
        """Where both were measured."""
        where = [self.after.target]
        if self.after.batch_size is not None:
            where.append(f"batch {self.after.batch_size}")
        if self.after.threads is not None:
            where.append(f"{self.after.threads} thread{'s' if self.after.threads != 1 else ''}")
        return ", ".join(where)


@dataclass(frozen=True)
class Row:
    """One line of the comparison; better: whether the change is wanted, None where there is none."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class LayerView:
    """All that the steps did to one layer."""

    name: str
    kind: str
    actions: str
    kept: int | None
    of: int | None
    sparsity: float | None
    bits: float | None
    format: str | None
    range: tuple[float, float] | None
    clipped: float | None
    error: float | None
    reason: str

    @property
    def width(self) -> float | None:
        """Fraction of its channels or neurons that was kept."""
        return self.kept / self.of if self.kept is not None and self.of else None


def pairs(report: Report) -> list[Pair]:
    """Each measurement after, with the fastest one before on the same target, batch size and threads.

    Where none was measured there, the fastest of the same batch size, else the first.
    """
    found = []
    for after in report.after:
        same = [b for b in report.before if b.batch_size == after.batch_size]
        here = [b for b in same if (b.target, b.threads) == (after.target, after.threads)]
        candidates = here or same or list(report.before)
        if candidates:
            found.append(Pair(min(candidates, key=_latency) if here or same else candidates[0], after))
    return found


def rows(pair: Pair, report: Report) -> list[Row]:
    """The comparison line by line; what was measured on neither side is left out."""
    before, after = pair.before, pair.after
    found: list[Row | None] = [_quality_row(pair, report)]
    found += [
        _row("Latency, median", before.latency_p50_ms, after.latency_p50_ms, show_ms, "faster", "slower"),
        _row("Latency, 95th percentile", before.latency_p95_ms, after.latency_p95_ms, show_ms, "faster", "slower"),
        _row("Model file", before.file_bytes, after.file_bytes, show_bytes, "smaller", "larger"),
        _row("Parameters in memory", before.memory_bytes, after.memory_bytes, show_bytes, "smaller", "larger"),
        _row("Bits per weight", before.bits_per_weight, after.bits_per_weight, digits, "fewer", "more"),
        _row("Parameters", before.parameters, after.parameters, show_count, "fewer", "more"),
        _row("MACs per example", before.macs, after.macs, show_count, "fewer", "more"),
    ]
    return [row for row in found if row is not None]


def comparisons(report: Report) -> list[tuple[Pair, list[Row]]]:
    """Every pair with its rows; a later pair without those that read as in the first (a file's size, at any batch)."""
    found: list[tuple[Pair, list[Row]]] = []
    for pair in pairs(report):
        shown = rows(pair, report)
        kept = [row for row in shown if row not in found[0][1]] if found else shown
        if kept:
            found.append((pair, kept))
    return found


def layers(report: Report) -> list[LayerView]:
    """One view for each layer that a step touched or skipped, in the order first met; later numbers win."""
    found: dict[str, list[LayerRow]] = {}
    for step in report.steps:
        for row in step.layers:
            found.setdefault(row.name, []).append(row)
    return [_merged(group) for group in found.values()]


def skipped_by_reason(report: Report) -> list[tuple[str, list[str]]]:
    """(reason, names of the layers skipped for it), the most frequent reason first."""
    found: dict[str, list[str]] = {}
    for row in report.skipped:
        names = found.setdefault(row.reason or "no reason given", [])
        if row.name not in names:
            names.append(row.name)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def in_percent(report: Report) -> bool:
    """Whether the metric is a fraction, shown as a percentage: every value of it lies in [0, 1]."""
    values = [m.quality["value"] for m in report.before + report.after if m.quality and is_number(m.quality["value"])]
    values += [c.quality for c in report.candidates if is_number(c.quality)]
    return bool(values) and all(0 <= value <= 1 for value in values)


def metric_name(report: Report) -> str:
    """The metric's name as a label."""
    for measurement in report.before + report.after:
        if measurement.quality and measurement.quality.get("name"):
            name = str(measurement.quality["name"])
            return name[:1].upper() + name[1:]
    return "Quality"


def outcome(report: Report) -> str:
    """Two or three words: whether the goal was met."""
    return {True: "Goal met", False: "Goal not met", None: "No goal set"}[report.met]


def summary(report: Report) -> str:
    """The verdict and the main figures, before -> after, in one line."""
    parts = [f"{report.title}: {outcome(report).lower()}" if report.met is not None else report.title]
    for pair in pairs(report)[:1]:
        wanted = (metric_name(report), "Latency, median", "Model file", "MACs per example")
        shown = [row for row in rows(pair, report) if row.name in wanted]
        parts += [f"{row.name} {row.before} → {row.after} ({row.change})" for row in shown]
    return "; ".join([*parts, report.verdict] if report.verdict else parts)


def _latency(measurement: Measurement) -> float:
    latency = measurement.latency_p50_ms
    return latency if is_number(latency) else float("inf")


def _quality_row(pair: Pair, report: Report) -> Row | None:
    before, after = ((m.quality or {}).get("value") for m in (pair.before, pair.after))
    percent = in_percent(report)

    def show(value: Any) -> str:
        return show_quality(value, percent) if is_number(value) else ABSENT

    if before is None and after is None:
        return None
    name = metric_name(report)
    if not is_number(before) or not is_number(after):
        return Row(name, show(before), show(after), ABSENT, None)
    change = show_difference(after - before, percent)
    return Row(name, show(before), show(after), change, None if change == "unchanged" else after > before)


def _row(
    name: str, before: float | None, after: float | None, show: Callable[[float], str], better: str, worse: str
) -> Row | None:
    if not is_number(before) or not is_number(after):
        if not is_number(before) and not is_number(after):
            return None
        texts = [show(value) if is_number(value) else ABSENT for value in (before, after)]
        return Row(name, texts[0], texts[1], ABSENT, None)
    change = show_ratio(before, after, better, worse)
    return Row(name, show(before), show(after), change, None if change in ("unchanged", ABSENT) else after < before)


def _merged(group: list[LayerRow]) -> LayerView:
    """The rows of one layer as one: the last value of each, but what was measured before it was trained."""

    def last(field: str, start: int = 0) -> Any:
        return next((v for row in reversed(group[start:]) if (v := getattr(row, field)) is not None), None)

    trained = max((i for i, row in enumerate(group) if row.action == "trained"), default=0)
    actions = list(dict.fromkeys(row.action for row in group))
    if len(actions) > 1:
        actions = [action for action in actions if action != "skipped"]
    return LayerView(
        name=group[0].name,
        kind=group[-1].kind,  # a step that cuts may speak of channels, where a later one names the class
        actions=", ".join(actions),
        kept=last("kept"),
        of=next((row.of for row in group if row.of is not None), None),  # of the original, if cut twice
        sparsity=last("sparsity"),
        bits=last("bits"),
        format=last("format"),
        range=last("range"),
        clipped=last("clipped", trained),
        error=last("error", trained),
        reason="; ".join(dict.fromkeys(row.reason for row in group if row.reason)),
    )
