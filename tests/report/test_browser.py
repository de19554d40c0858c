"""The page in a real browser, at the width of a desk and of a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from gracile.report import LayerRow
from gracile.report.html import render_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
         "--virtual-time-budget=3000"]  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

#: Headless windows have a least width of their own; a frame has none. Its script measures and sorts from outside.
WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><pre id="out"></pre><script>
document.getElementById("f").onload = () => {{
  const d = document.getElementById("f").contentDocument, root = d.documentElement;
  const tops = [...d.querySelectorAll("svg")].filter((s) => s.getBoundingClientRect().width > 0);
  const button = [...d.querySelectorAll(".sortable button")].find((b) => b.textContent === "Error");
  const column = () => [...d.querySelectorAll(".sortable tbody tr")].map(
    (r) => r.cells[button.closest("th").cellIndex].dataset.value ?? null);
  button.click(); const up = column(); button.click();
  document.getElementById("out").textContent = JSON.stringify({{
    client: root.clientWidth, scroll: root.scrollWidth, plots: tops.length, up: up, down: column(),
    wide: [...d.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") && !e.closest("svg")
      && e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.tagName + "." + e.className),
    text: [...d.querySelectorAll("svg text")].filter((t) => t.getBoundingClientRect().width > 0)
      .map((t) => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)),
  }});
}};</script>"""


def open_page(file, tmp_path):
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def awkward(report):
    """The report with long words, long tables and a layer without an error."""
    rows = tuple(
        LayerRow(name=f"backbone.stage_{i}." + "very_long_block_name." * 4 + "conv", kind="Conv2d", action="quantized",
                 bits=8.0, error=None if i == 5 else 0.1 * ((7 * i) % 11))
        for i in range(40)
    )  # fmt: skip
    steps = (replace(report.steps[0], title="Prune" + "x" * 120), replace(report.steps[2], layers=rows))
    return replace(report, title="A" * 90, steps=steps, environment={"processor": "y" * 150})


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [lambda r: r, awkward], ids=["plain", "awkward"])
def test_the_page_fits_shows_its_plots_and_sorts(report, make, width, tmp_path):
    file = tmp_path / "wrapper.html"
    page = html.escape(render_html(make(report)), quote=True)
    file.write_text(WRAPPER.format(width=width, page=page), encoding="utf-8")
    dom, console = open_page(file, tmp_path)
    assert console == []
    seen = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL).group(1)))
    assert seen["client"] in (width, width - 15)  # a classic scroll bar may take its part
    assert seen["scroll"] <= seen["client"]
    assert seen["wide"] == []
    assert seen["plots"] == 5  # of each pair, wide or narrow, one is shown
    assert min(seen["text"]) > 8.5  # CSS pixels, on a phone too
    up, down = ([float(v) for v in seen[way] if v is not None] for way in ("up", "down"))
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert len(up) > 10
    for order in (seen["up"], seen["down"]):
        assert None not in order[: len(up)]  # layers without a number come last, either way


def test_the_page_alone_reports_no_error(report, tmp_path):
    report.save(tmp_path)
    dom, console = open_page(tmp_path / "report.html", tmp_path)
    assert console == []
    assert "Goal met" in dom
