"""The search behind `optimize`, on a net small enough to train here and a clock that counts multiply-accumulates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance.resumable_run import InProcess, counted_call, counted_latency, make_data, trained

import gracile as gc
import gracile.graph
import gracile.measure
import gracile.search
from gracile.search import WIDTH_STEPS, Search


@pytest.fixture(autouse=True)
def _counting_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gracile.measure, "_timed_call", counted_call)
    monkeypatch.setattr(gracile.measure, "measure_latency", counted_latency)
    monkeypatch.setattr(gracile.search, "mixed_precision_pays", lambda model, data: False)


def optimized(tmp_path: Path, data: gc.Data | None = None, **goal: Any) -> gc.Result:
    data = data or make_data()
    settings = {"target": InProcess(), "max_drop": 0.2, "epochs": 1} | goal
    return gc.optimize(trained(make_data()), data, gc.Goal(**settings), run_dir=tmp_path / "run")


def search(folder: Path, **goal: Any) -> Search:
    data = make_data()
    settings = {"target": InProcess(), "max_drop": 0.2, "epochs": 1} | goal
    return Search(trained(data), data, gc.Goal(**settings), None, 0, folder, None)


def test_the_fastest_candidate_within_the_limit_is_returned(tmp_path: Path) -> None:
    result = optimized(tmp_path)
    candidates = {c.label: c for c in result.report.candidates}
    assert {"original", "W8A8 float"} <= set(candidates)
    assert result.met
    fastest = min((c for c in candidates.values() if c.met), key=lambda c: c.latency_ms or 0)
    assert result.report.after[0].latency_p50_ms == fastest.latency_ms
    assert result.report.after[0].latency_p50_ms < 0.61 * result.report.before[0].latency_p50_ms
    assert "drop" in result.report.verdict


def test_a_limit_on_latency_is_kept_by_a_width_that_just_reaches_it(tmp_path: Path) -> None:
    result = optimized(tmp_path, limits=(gc.Latency(0.3),), max_drop=0.9)
    assert result.met
    before, after = result.report.before[0], result.report.after[0]
    assert after.latency_p50_ms <= 0.3 * before.latency_p50_ms
    assert after.latency_p50_ms > 0.3 * 0.5 * before.latency_p50_ms  # no narrower than it had to be


def test_no_units_go_where_integers_keep_the_limit(tmp_path: Path) -> None:
    result = optimized(tmp_path, limits=(gc.Latency(0.7),))
    assert result.met
    assert result.report.reason == "the limits are met without removing units"
    assert result.report.after[0].macs == result.report.before[0].macs


def test_a_goal_out_of_reach_gives_the_nearest_miss_and_says_so(tmp_path: Path) -> None:
    result = optimized(tmp_path, limits=(gc.Latency(0.001),))
    assert not result.met
    assert "no width reaches" in result.report.reason
    assert all(c.met is False and c.reason for c in result.report.candidates)


def test_the_smallest_file_is_an_objective_of_its_own(tmp_path: Path) -> None:
    result = optimized(tmp_path, objective="bytes")
    met = [c for c in result.report.candidates if c.met]
    assert result.met
    assert result.report.after[0].file_bytes == min(c.file_bytes for c in met)


def test_the_width_is_the_smallest_share_that_reaches_a_latency(tmp_path: Path) -> None:
    bisecting = search(tmp_path / "run")
    form = next(f for f in bisecting.forms if f.scheme is None)
    full_ms = gracile.graph.trace(bisecting.model, lambda n: n(torch.zeros(1, 1, 8, 8))).macs / 1e6
    fraction = bisecting.width_for(form, 0.1, full_ms, "here")
    macs = []
    for step in range(1, WIDTH_STEPS):
        net = bisecting.narrowed(step / WIDTH_STEPS)
        macs.append(None if net is None else gracile.graph.trace(net, lambda n: n(torch.zeros(1, 1, 8, 8))).macs)
    reaching = [i + 1 for i, count in enumerate(macs) if count is not None and count / 1e6 <= 0.1]
    assert fraction is not None and reaching
    assert fraction * WIDTH_STEPS == min(reaching)
    assert bisecting.width_for(form, 1e-9, full_ms, "never") is None


def test_what_was_decided_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = optimized(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished decision was made again")

    monkeypatch.setattr(Search, "verify", fail)
    monkeypatch.setattr(Search, "narrowed", fail)
    second = optimized(tmp_path)
    assert [c.label for c in first.report.candidates] == [c.label for c in second.report.candidates]
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_another_goal_does_not_go_on_in_the_same_directory(tmp_path: Path) -> None:
    optimized(tmp_path)
    with pytest.raises(gc.RunError):
        optimized(tmp_path, max_drop=0.3)


def test_out_of_time_the_best_so_far_is_returned(tmp_path: Path) -> None:
    result = optimized(tmp_path, minutes=1e-6)
    assert result.report.reason == "out of time"
    assert {c.label for c in result.report.candidates} == {"original", "W8A8 float"}
    assert result.met


def test_the_users_model_is_not_touched_unless_asked(tmp_path: Path) -> None:
    model, data = trained(make_data()), make_data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    goal = gc.Goal(target=InProcess(), max_drop=0.2, epochs=0)
    result = gc.optimize(model, data, goal, run_dir=tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = next(iter(data.evaluation or ()))[0]
    same = gc.optimize(model, data, goal, run_dir=tmp_path / "run", inplace=True)
    assert same.model is model
    with torch.no_grad():
        assert torch.equal(model(x), result.model(x))


def test_progress_names_what_is_going_on(tmp_path: Path) -> None:
    seen: list[gc.Progress] = []
    data = make_data()
    goal = gc.Goal(target=InProcess(), max_drop=0.2, epochs=1)
    gc.optimize(trained(data), data, goal, run_dir=tmp_path / "run", on_progress=seen.append)
    phases = {progress.phase.split()[0] for progress in seen}
    assert {"profile", "candidate", "width"} <= phases
    assert all(p.total is None or 0 <= p.done <= p.total for p in seen)


def test_the_report_keeps_the_whole_search(tmp_path: Path) -> None:
    result = optimized(tmp_path)
    written = json.loads(json.dumps(result.report.to_json()))
    assert len(written["candidates"]) == len(result.report.candidates)
    assert written["goal"]["max_drop"] == 0.2
