from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest

from gracile.report import Candidate, LayerRow, Report, StepRecord
from gracile.report.html import render_html, render_notebook

HOSTILE = "</td><script>alert('x')</script><img src=x onerror=alert(1)>\"'&$a_{b}$"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.text.append(data)


def large(layers=500, candidates=50):
    rows = tuple(
        LayerRow(name=f"encoder.layer.{i}.attention.output.dense", kind="Linear", action="quantized", kept=500, of=768,
                 bits=8.0, sparsity=0.5, error=0.01 * i)
        for i in range(layers)
    )  # fmt: skip
    tried = tuple(Candidate(label=f"c{i}", quality=0.8 + i / 1000, latency_ms=1.0 + i, met=False, reason="slow")
                  for i in range(candidates))  # fmt: skip
    return rows, tried


def test_nothing_is_fetched_from_anywhere(report):
    page = Page(render_html(report))
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert value.startswith(("#", "data:")), (tag, key, value)
    text = render_html(report)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_sections_are_there_when_there_is_something_to_say(report):
    text = render_html(report)
    for heading in ("Before and after", "What was tried", "What was done", "Layer by layer",
                    "What was skipped, and why",
                    "What changed in behaviour", "Parity of the exported model", "Goal and environment",
                    "How to reproduce", "Every measurement", "Latency, run by run"):  # fmt: skip
        assert heading in text
    for words in ("Goal met", "2.71× faster", "11 of 16", "0.9996", "112 became wrong", "seed 7"):
        assert words in text


def test_missing_parts_are_absent_not_empty():
    page = Page(render_html(Report(title="bare")))
    assert not {"section", "table", "svg", "figure", "ul"} & set(page.tags)


def test_ids_are_unique_and_references_resolve(report):
    page = Page(render_html(report))
    assert len(page.ids) == len(set(page.ids))
    referenced = {value[1:] for _, key, value in page.attributes if key == "xlink:href"}
    referenced |= {value for _, key, value in page.attributes if key == "aria-labelledby"}
    referenced |= set(re.findall(r"url\(#([^)]*)\)", render_html(report)))
    assert referenced
    assert referenced <= set(page.ids)


def test_every_plot_says_what_it_shows(report):
    page = Page(render_html(report))
    labels = [value for tag, key, value in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert len(labels) == page.tags.count("svg") == 8  # three drawn wide and narrow, two once
    assert all(len(label) > 20 for label in labels)


def test_hostile_names_are_text(report):
    step = StepRecord(
        step={"type": HOSTILE}, title=HOSTILE, seconds=1.0, notes=(HOSTILE,), numbers={HOSTILE: 1.0},
        layers=tuple(LayerRow(name=HOSTILE + str(i), kind=HOSTILE, action=a, kept=1, of=2, bits=8.0, reason=HOSTILE)
                     for i, a in enumerate(("cut", "skipped"))),
    )  # fmt: skip
    quality = {"value": 0.9, "low": 0.8, "high": 1.0, "examples": 5, "name": HOSTILE}
    names = {"label": HOSTILE, "target": HOSTILE, "precision": HOSTILE, "quality": quality}
    hostile = replace(
        report, title=HOSTILE, verdict=HOSTILE, reason=HOSTILE, created=HOSTILE, steps=(step,),
        goal={HOSTILE: HOSTILE, "max_drop": 0.01}, environment={HOSTILE: {HOSTILE: HOSTILE}},
        parity=({HOSTILE: HOSTILE},),
        before=tuple(replace(m, **names) for m in report.before),
        after=tuple(replace(m, **names) for m in report.after),
        candidates=tuple(replace(c, label=HOSTILE, reason=HOSTILE) for c in report.candidates),
    )  # fmt: skip
    page = Page(render_html(hostile))
    assert page.tags.count("script") == Page(render_html(report)).tags.count("script") == 1
    assert "img" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert any("<script>alert" in text for text in page.text)  # shown as it is


def test_hundreds_of_layers_stay_below_3_mb(report):
    rows, tried = large()
    big = replace(report, steps=(replace(report.steps[2], layers=rows),), candidates=tried)
    text = render_html(big)
    assert len(text.encode()) < 3_000_000
    assert text.count("encoder.layer.") >= 500


def test_the_same_report_gives_the_same_page(report):
    assert render_html(report) == render_html(report)


def test_the_settings_of_matplotlib_stay_as_they_were(report):
    before = dict(matplotlib.rcParams)
    render_html(report)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "behaviour",
    [
        {"examples": 40, "relative_error": 0.1, "largest_error": 0.4, "cosine": 0.99,
         "most_changed": [{"index": 3, "shift": 0.3, "label": None, "before": None, "after": None}]},
        {"examples": 40, "relative_error": 0.1, "largest_error": 0.4, "cosine": None, "most_changed": []},
    ],
    ids=["vectors", "numbers"],
)  # fmt: skip
def test_outputs_that_are_not_classes(report, behaviour):
    text = render_html(replace(report, behaviour=behaviour))
    assert "Relative error of the outputs" in text
    assert ("Mean cosine" in text) == (behaviour["cosine"] is not None)
    assert "Calibration" not in text


def test_a_candidate_without_numbers_has_a_line_but_no_point(report):
    only = replace(report, candidates=(Candidate(label="failed", met=False, reason="export failed"),))
    text = render_html(only)
    assert "export failed" in text
    assert "Up and to the left" not in text


def test_in_a_notebook_the_page_is_in_a_frame_of_its_own(report):
    frame = Page(render_notebook(report))
    assert frame.tags == ["iframe"]
    assert ("iframe", "srcdoc", render_html(report)) in frame.attributes
    assert report._repr_html_().startswith("<iframe")
