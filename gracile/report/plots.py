"""Plots of a report as inline SVG; their colours are CSS variables, and so follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from gracile.report.model import Candidate, Report
from gracile.report.text import is_number, show_any
from gracile.report.view import LayerView, in_percent, metric_name, pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Drawn colours that stand for CSS variables: Matplotlib writes them as they are, `_svg` puts the variables there.
INK, MUTED, LINE, BEFORE, AFTER, BAD, SOFT, SURFACE = (f"#0{i}0{i}0{i}" for i in range(1, 9))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    BEFORE: "before",
    AFTER: "accent",
    BAD: "warn",
    SOFT: "accent-soft",
    SURFACE: "surface",
}
FONT = 12  # one unit of a figure is one CSS pixel at its full width
LABELLED_LAYERS = 24  # more than that get no names under their bars
LABELLED_CANDIDATES = 8
SINGLE_BARS = 64  # more layers than that are drawn as one outline
HALF = 360  # pixels of a plot that shares its row


def candidates(report: Report, width: int) -> str | None:
    """Quality against latency of every candidate, original and result, with the goal's limits; None: no data."""
    points = [c for c in report.candidates if is_number(c.quality) and is_number(c.latency_ms)]
    ends = [end for p in pairs(report)[:1] for end in ((p.before, "before"), (p.after, "after"))]
    ends = [(m, k) for m, k in ends if is_number((m.quality or {}).get("value")) and is_number(m.latency_p50_ms)]
    if not points or len(points) + len(ends) < 2:
        return None
    factor = 100.0 if in_percent(report) else 1.0
    figure, axes = _figure(width, 400 if width > 500 else 320)
    for met, style in ((True, {"c": AFTER}), (None, {"c": MUTED}), (False, {"c": SURFACE, "edgecolors": BAD})):
        held = [c for c in points if c.met is met]
        if held:
            x, y = [c.latency_ms for c in held], [factor * c.quality for c in held]  # type: ignore[operator]
            label = {True: "met the goal", None: "tried", False: "missed the goal"}[met]
            axes.scatter(x, y, s=42, linewidths=1.4, label=label, zorder=3, **style)  # type: ignore[arg-type]
    for measurement, kind in ends:
        colour, name = (BEFORE, "original") if kind == "before" else (AFTER, "result")
        assert measurement.quality is not None
        spot = (measurement.latency_p50_ms, factor * measurement.quality["value"])
        axes.scatter(
            *spot,
            s=90 if kind == "before" else 360,
            marker="D" if kind == "before" else "*",
            c=colour,
            label=name,
            zorder=4,
            edgecolors=SURFACE,
        )
    _limits(axes, report, factor, [m.quality["value"] for m, k in ends if k == "before" and m.quality])
    if len(points) <= LABELLED_CANDIDATES and width > 500:
        _name_points(axes, points, factor)
    axes.set_xlabel("Latency, median (ms)", color=MUTED)
    axes.set_ylabel(metric_name(report) + (" (%)" if factor == 100 else ""), color=MUTED)
    axes.margins(0.08, 0.12)
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=5 if width > 500 else 2,
        frameon=False,
        labelcolor=MUTED,
        fontsize=FONT - 1,
    )
    count = f"{len(points)} candidate{'s' if len(points) != 1 else ''}"
    return _svg(figure, f"{metric_name(report)} against latency of {count}, the original and the result.", f"c{width}")


def layer_bars(views: list[LayerView], width: int) -> str | None:
    """Width kept, bits and sparsity of each layer, one panel for each that any layer has; None: no data."""
    panels = [
        ("Width kept (%)", [None if v.width is None else 100 * v.width for v in views], 100.0),
        ("Bits per weight", [v.bits for v in views], None),
        ("Zeros (%)", [None if v.sparsity is None else 100 * v.sparsity for v in views], 100.0),
    ]
    panels = [p for p in panels if any(is_number(value) for value in p[1])]
    if not panels:
        return None
    named = len(views) <= LABELLED_LAYERS and width > 500
    longest = max(len(_short(v.name)) for v in views) if named else 0
    figure, grid = _figure(width, 130 * len(panels) + (6 * longest + 20 if named else 30), rows=len(panels))
    grid = [grid] if len(panels) == 1 else grid
    for axes, (title, values, top) in zip(grid, panels):
        heights = [value if is_number(value) else 0.0 for value in values]
        if len(views) <= SINGLE_BARS:
            axes.bar(range(len(views)), heights, width=0.72, color=AFTER)
        else:
            axes.stairs(heights, [i - 0.5 for i in range(len(views) + 1)], fill=True, color=AFTER)
        axes.set_title(title, loc="left", color=INK, fontsize=FONT)
        axes.set_ylim(0, top or 1.1 * max(max(heights), 1.0))
        axes.set_xlim(-0.6, max(len(views), 12) - 0.4)  # a few layers make no slabs
        axes.set_xticks([])
    if named:
        grid[-1].set_xticks(range(len(views)), [_short(v.name) for v in views], rotation=90, parse_math=False)
    else:
        grid[-1].set_xlabel(f"{len(views)} layers, first to last", color=MUTED)
    names = ", ".join(title.split(" (")[0].lower() for title, _, _ in panels)
    return _svg(figure, f"For each of {len(views)} layers: {names}. The table below has the numbers.", f"l{width}")


def latencies(report: Report, width: int) -> str | None:
    """Distribution of the single timings before and after; None: not kept."""
    for pair in pairs(report):
        before, after = pair.before.latencies_ms, pair.after.latencies_ms
        if len(before) > 1 and len(after) > 1:
            figure, axes = _figure(width, 220)
            import numpy as np

            spread = np.sort(np.concatenate((before, after)))
            # Timings have a long tail: one bin of it would flatten the rest.
            edges = np.linspace(spread[0], spread[int(0.99 * (len(spread) - 1))] or 1.0, 41)
            for values, colour, name in ((before, BEFORE, "before"), (after, AFTER, "after")):
                counts = np.histogram(values, edges)[0] / len(values)
                axes.stairs(100 * counts, edges, fill=True, alpha=0.75, color=colour, label=name)
            axes.set_xlabel("Latency of one batch (ms)", color=MUTED)
            axes.set_ylabel("Runs (%)", color=MUTED)
            axes.legend(frameon=False, labelcolor=MUTED, fontsize=FONT - 1)
            return _svg(figure, f"Distribution of latency on {pair.title}, before and after.", f"t{width}")
    return None


def flips(behaviour: dict[str, Any]) -> str | None:
    """How many predictions changed, by what became of them; None for outputs that are not classes."""
    if "right_to_wrong" not in behaviour:
        return None
    lost, won = behaviour["right_to_wrong"], behaviour["wrong_to_right"]
    bars = [
        ("became wrong", lost, BAD),
        ("became right", won, AFTER),
        ("wrong, differently", behaviour["changed"] - lost - won, BEFORE),
    ]
    figure, axes = _figure(HALF, 170)
    axes.barh([name for name, _, _ in bars], [n for _, n, _ in bars], color=[c for _, _, c in bars], height=0.6)
    for row, (_, count, _) in enumerate(bars):
        axes.annotate(
            f"{count}",
            (count, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=FONT - 1,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*(n for _, n, _ in bars), 1))
    axes.set_xlabel(f"Predictions, of {behaviour['examples']}", color=MUTED)
    axes.grid(False, axis="y")
    alt = f"{lost} predictions became wrong, {won} became right, {bars[2][1]} changed from one wrong class to another."
    return _svg(figure, alt, "f")


def reliability(behaviour: dict[str, Any]) -> str | None:
    """Accuracy against confidence in bins, before and after; None for outputs that are not classes."""
    if not isinstance(behaviour.get("before"), dict) or "bins" not in behaviour["before"]:
        return None
    figure, axes = _figure(HALF, 280)
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.5, zorder=1)
    for side, colour in (("before", BEFORE), ("after", AFTER)):
        bins = [b for b in behaviour[side]["bins"] if b[0] > 0]
        axes.plot([b[1] for b in bins], [b[2] for b in bins], "o-", color=colour, label=side, markersize=5)
    axes.set_xlabel("Confidence", color=MUTED)
    axes.set_ylabel("Accuracy", color=MUTED)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, labelcolor=MUTED, fontsize=FONT - 1, loc="upper left")
    return _svg(figure, "Accuracy against confidence, before and after; the diagonal is perfect calibration.", "r")


def _limits(axes: Axes, report: Report, factor: float, before: list[float]) -> None:
    goal = report.goal or {}
    if is_number(goal.get("max_drop")) and before:
        floor = factor * (before[0] - goal["max_drop"])
        axes.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "lowest quality allowed", (0.005, floor), xycoords=("axes fraction", "data"), xytext=(0, -4),
            textcoords="offset points", va="top", color=MUTED, fontsize=FONT - 1,
        )  # fmt: skip
    if is_number(goal.get("latency_ms")):
        axes.axvline(goal["latency_ms"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "latency limit", (goal["latency_ms"], 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", va="bottom", color=MUTED, fontsize=FONT - 1,
        )  # fmt: skip


def _name_points(axes: Axes, points: list[Candidate], factor: float) -> None:
    for c in points:
        spot = (c.latency_ms, factor * c.quality)  # type: ignore[operator]
        axes.annotate(
            _short(c.label, 28), spot, xytext=(8, 3), textcoords="offset points", color=INK, fontsize=FONT - 1,
            parse_math=False,
        )  # type: ignore[arg-type]  # fmt: skip


def _short(name: str, most: int = 22) -> str:
    """The end of a long name, which tells layers apart."""
    text = show_any(name)
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def _figure(width: int, height: int, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of that many pixels without a frame, and its axes (a list of them for several rows)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axes in grid:
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(LINE)
        axes.tick_params(colors=MUTED, labelsize=FONT - 1, length=0, pad=6)
        axes.grid(True, axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_size(FONT)
        axes.yaxis.label.set_size(FONT)
    return figure, grid[0] if rows == 1 else grid


def _svg(figure: Figure, alt: str, prefix: str) -> str:
    """The figure as an SVG element for a page: text as text, ids of its own, no links, colours as variables."""
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    # These two can only be set there; the context puts them back.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gracile"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    text = f'<svg {view.group()} role="img" aria-label="{escape(alt)}">' + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)
