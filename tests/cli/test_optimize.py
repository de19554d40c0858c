"""gracile optimize: exit codes by whether the goal was met, with the best result saved either way."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

import gracile as gc

pytest.importorskip("onnxruntime")

COMMAND = ("optimize", "shop:make_net", "--data", "shop:make_data", "--target", "onnxruntime", "--epochs", 0)


def test_a_goal_that_the_original_meets_ends_with_code_0(run_json, shop):
    found = run_json(*COMMAND, "--max-drop", 1.0, "--limit", "latency-ms=1000", "--out", "slim")
    assert found["met"] is True
    assert found["report"]["goal"]["max_drop"] == 1.0
    gc.load("slim", sys.modules["shop"].Net())
    assert (shop / "slim.run/run.json").is_file()


def test_a_goal_that_is_not_met_ends_with_code_3_and_saves_the_best(run_json, monkeypatch):
    def missed(model, data, goal, **settings):
        return replace(gc.compress(model, gc.Quantize(gc.W8A16)), met=False)

    monkeypatch.setattr(sys.modules["gracile.optimize"], "optimize", missed)
    found = run_json(*COMMAND, "--limit", "macs=0.1", "--out", "slim", code=3)
    assert found["met"] is False
    assert type(gc.load("slim", sys.modules["shop"].Net()).head).__name__ == "QuantizedLinear"


def test_the_options_become_the_goal(run_json, monkeypatch):
    asked = []

    def met(model, data, goal, **settings):
        asked.append((goal, settings["seed"], str(settings["run_dir"])))
        return replace(gc.compress(model, gc.Quantize(gc.W8A16)), met=True)

    monkeypatch.setattr(sys.modules["gracile.optimize"], "optimize", met)
    options = (
        "--threads",
        1,
        "--max-drop",
        0.02,
        "--objective",
        "bytes",
        "--limit",
        "latency=0.4",
        "--limit",
        "macs=0.5",
    )
    options += ("--limit", "latency-ms=2", "--batch-size", 8, "--minutes", 5, "--seed", 7, "--run-dir", "kept")
    run_json(*COMMAND, *options)
    goal = gc.Goal(
        target=gc.OnnxRuntime(threads=1),
        max_drop=0.02,
        objective="bytes",
        limits=(gc.Latency(0.4), gc.MACs(0.5), gc.Latency(2, ms=True)),
        batch_size=8,
        epochs=0,
        minutes=5,
    )
    assert asked == [(goal, 7, "kept")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--limit", "speed=2"), "is not a limit"),
        (("--limit", "latency"), "is not a limit"),
        (("--limit", "macs=-1"), "is not a limit"),
        (("--limit", "macs=nan"), "is not a limit"),
        (("--limit", "latency=2.5"), "latency-ms=2.5"),
        (("--max-drop", "-1"), "max_drop"),
        (("--precision", "f8"), "precision"),
        (("--objective", "speed"), "--objective"),
        (("--minutes", "0"), "minutes"),
    ],
)
def test_impossible_settings_are_wrong_usage(run, options, said):
    assert said in run(*COMMAND, *options, code=2).stderr


def test_without_evaluation_data_it_says_what_is_needed(run):
    command = ("optimize", "shop:make_net", "--data", "shop:calibration_only", "--target", "onnxruntime")
    assert "evaluation" in run(*command, code=1).stderr


def test_stopped_by_the_user_it_says_that_it_goes_on(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["gracile.optimize"], "optimize", interrupted)
    assert "the same command goes on" in run(*COMMAND, "--out", "slim", code=130).stderr
