"""The command as a program: help, version, `python -m gracile`, and the demo."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from gracile.cli import main
from gracile.compress import compress
from gracile.formats import W8A16
from gracile.ranges import MinMax
from gracile.steps import Quantize
from gracile.version import __version__

COMMANDS = {"demo", "inspect", "optimize", "compress", "evaluate", "export", "bench", "report", "doctor"}


def test_every_command_of_the_design_is_there_with_help(run):
    assert set(main.commands) == COMMANDS
    for name in COMMANDS:
        shown = run(name, "--help").stdout
        assert shown.startswith("Usage:")
        assert "--json" in shown


def test_python_m_gracile_is_the_same_program():
    found = subprocess.run([sys.executable, "-m", "gracile", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["gracile,", "version", __version__]


def test_the_commands_import_no_runtime_plotting_or_hub_package():
    code = (
        "import sys, gracile.cli; heavy = {'onnx', 'onnxruntime', 'openvino', 'transformers', 'matplotlib', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_demo_optimizes_what_the_package_ships(run_json, monkeypatch, shop):
    asked = []

    def quick(model, data, goal, **settings):
        asked.append((type(model).__name__, goal))
        return replace(compress(model, Quantize(W8A16, ranges=MinMax())), met=True)

    monkeypatch.setattr(sys.modules["gracile.optimize"], "optimize", quick)
    found = run_json("demo", "--out", "full")
    run_json("demo", "--quick", "--out", "quick")
    (name, full), (_, short) = asked
    assert name == "DigitsNet"
    assert full.max_drop == short.max_drop == 0.015
    assert 0 < short.epochs < full.epochs
    assert found["met"] is True
    assert (shop / "full/report.html").is_file()


@pytest.mark.slow
def test_the_demo_meets_its_goal_within_three_minutes(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-m", "gracile", "demo", "--out", str(tmp_path / "demo")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert time.monotonic() - started < 180
    assert "Goal met" in found.stdout


@pytest.mark.parametrize("missing", ["onnxruntime", "openvino"])
def test_the_demo_says_which_runtime_is_passed_over(monkeypatch, missing):
    from gracile.cli.demo import first_target
    from gracile.cli.terminal import Terminal

    said = []
    monkeypatch.setattr(Terminal, "say", lambda self, text: said.append(text))
    for name in ("onnxruntime", "openvino") if missing == "openvino" else ("onnxruntime",):
        monkeypatch.setitem(sys.modules, name, None)
    expected = {"onnxruntime": "openvino", "openvino": "pytorch"}[missing]
    assert first_target(Terminal()).name == expected
    assert any(f"gracile[{missing}]" in text for text in said)
