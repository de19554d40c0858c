from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gracile.errors import ArtifactError, RunError
from gracile.report import Candidate, LayerRow, Report, StepRecord
from gracile.report.plain import decode, encode, plain


def through_json(report):
    return Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_a_report_comes_back_exactly(report):
    assert through_json(report) == report


def test_an_empty_report_comes_back_exactly():
    assert through_json(Report(title="nothing")) == Report(title="nothing")


def test_nan_and_infinity_survive_strict_json():
    step = StepRecord(step={}, title="t", seconds=0.0, numbers={"loss": float("nan"), "best": float("-inf")})
    report = Report(title="t", comparison={"upper_bound": float("inf"), "list": [float("nan")]}, steps=(step,))
    back = through_json(report)
    assert back.comparison["upper_bound"] == float("inf")
    assert np.isnan(back.comparison["list"][0])
    assert np.isnan(back.steps[0].numbers["loss"])
    assert back.steps[0].numbers["best"] == float("-inf")


def test_plain_takes_what_numpy_torch_and_tuples_give():
    value = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), 3: (1, {"x"}), "m": Candidate(label="c")}
    result = plain(value)
    assert result["a"] == 0.5
    assert type(result["a"]) is float
    assert result["b"] == [1, 2]
    assert result["3"] == [1, ["x"]]
    assert result["m"]["label"] == "c"
    assert decode(json.loads(json.dumps(encode(value), allow_nan=False))) == result


def test_skipped_layers_are_those_of_all_steps(report):
    assert len(report.skipped) == 10
    assert {row.action for row in report.skipped} == {"skipped"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("schema"),
        lambda d: d.pop("steps"),
        lambda d: d.update(surprise=1),
        lambda d: d.update(before=[{"nonsense": 1}]),
        lambda d: d.update(steps=[{"edits": [{"edit": "Explode"}], "layers": [], "notes": []}]),
        lambda d: d.update(steps=3),
    ],
    ids=["schema", "missing", "unknown", "measurement", "edit", "type"],
)
def test_a_damaged_report_is_refused(report, damage):
    data = report.to_json()
    damage(data)
    with pytest.raises(ArtifactError, match=r"cannot be read|unknown kind"):
        Report.from_json(data)


def test_a_later_schema_says_to_upgrade(report):
    with pytest.raises(ArtifactError, match="Upgrade"):
        Report.from_json({**report.to_json(), "schema": 99})


def test_saved_and_loaded(report, tmp_path):
    page = report.save(tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert Report.load(tmp_path / "run") == report
    assert Report.load(tmp_path / "run" / "report.json") == report
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]


def test_a_file_cut_short_is_refused(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"report\.json"):
        Report.load(tmp_path)
    with pytest.raises(ArtifactError, match="No report"):
        Report.load(tmp_path / "absent")


def test_a_place_that_cannot_be_written_is_one_clear_error(report, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="Could not write"):
        report.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_summary_is_one_line_with_the_main_figures(report):
    summary = report.summary()
    assert "\n" not in summary
    for words in ("goal met", "Accuracy 91.48 % → 90.86 % (−0.62 pt)", "2.71× faster", "4.98× smaller", "2.13× fewer"):
        assert words in summary
    assert Report(title="bare", verdict="nothing measured").summary() == "bare; nothing measured"


def test_a_row_of_a_kind_unknown_here_still_round_trips(report):
    row = LayerRow(name="a", kind="MyLayer", action="rotated", error=float(np.float32(0.1)))
    changed = replace(report, steps=(replace(report.steps[0], layers=(row,)),))
    assert through_json(changed).steps[0].layers == (row,)
