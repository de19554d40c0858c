"""What a user gets wrong on the command line: a few lines on stderr, the right exit code, nothing on stdout."""

from __future__ import annotations

import pytest

USAGE, FAILED = 2, 1

CASES = {
    "no such module": (("inspect", "shoe:make_net"), USAGE, "no module 'shoe'"),
    "no such submodule": (("inspect", "shop.models:make_net"), USAGE, "shop"),
    "no such factory": (("inspect", "shop:make_nest"), USAGE, "make_net"),
    "no such file": (("inspect", "models/net.py:make"), USAGE, "There is no file"),
    "no factory named": (("inspect", "shop"), USAGE, "names no model"),
    "not callable": (("inspect", "shop:threshold"), USAGE, "not a function"),
    "factory fails": (("inspect", "shop:failing"), FAILED, "KeyError: 'weights.bin' (shop.py, line"),
    "factory returns nothing": (("inspect", "shop:nothing"), FAILED, "returned nothing (None)"),
    "factory wants arguments": (("inspect", "shop:Sized"), FAILED, "missing 1 required positional argument"),
    "data where a model belongs": (("inspect", "shop:make_data"), FAILED, "must return a PyTorch model"),
    "model where data belong": (
        ("inspect", "shop:make_net", "--data", "shop:make_net"), FAILED, "must return a gracile.Data"),
    "data of the wrong shape": (("inspect", "shop:make_net", "--data", "shop:wrong_shape"), FAILED, "does not run"),
    "a path as data": (("inspect", "shop:make_net", "--data", "shop.py"), USAGE, "named by the function"),
    "keras": (("inspect", "net.keras"), USAGE, "cannot be read yet"),
    "onnx": (("inspect", "net.onnx"), USAGE, "cannot be read yet"),
    "state dict": (("inspect", "net.pt"), USAGE, "holds weights"),
    "missing file": (("inspect", "gone.onnx"), USAGE, "There is no file 'gone.onnx'"),
    "empty directory": (("inspect", "empty"), USAGE, "neither"),
    "damaged artifact": (("inspect", "damaged"), FAILED, "damaged"),
    "class without artifact": (("inspect", "shop:make_net", "--class", "shop:make_net"), USAGE, "is none"),
    "module that fails": (("inspect", "broken:make"), USAGE, "ZeroDivisionError"),
    "module that exits": (("inspect", "script:make"), USAGE, "SystemExit"),
    "module with a missing import": (("inspect", "needy:make"), USAGE, "no_such_package"),
    "nothing to do": (("compress", "shop:make_net"), USAGE, "Nothing to do"),
    "pattern without amount": (("compress", "shop:make_net", "--pattern", "channels"), USAGE, "--prune 0.3"),
    "unknown pattern": (("compress", "shop:make_net", "--prune", "0.3", "--pattern", "rows"), USAGE, "not a pattern"),
    "impossible N:M": (("compress", "shop:make_net", "--pattern", "4:2"), USAGE, "NM"),
    "amount with N:M": (("compress", "shop:make_net", "--prune", "0.3", "--pattern", "2:4"), USAGE, "NM"),
    "fraction of one": (("compress", "shop:make_net", "--prune", "1"), USAGE, "below 1"),
    "negative fraction": (("compress", "shop:make_net", "--prune", "-0.1"), USAGE, "above 0"),
    "unknown format": (("compress", "shop:make_net", "--quantize", "w5a5"), USAGE, "not a number format"),
    "group of nothing": (
        ("compress", "shop:make_net", "--data", "shop:make_data", "--quantize", "w4a16:0"), USAGE, "0"),
    "static scales without data": (("compress", "shop:make_net", "--quantize", "w8a8"), FAILED, "data"),
    "distil without data": (("compress", "shop:make_net", "--distill", "1"), FAILED, "training data"),
    "criterion without data": (
        ("compress", "shop:make_net", "--prune", "0.3", "--criterion", "taylor"), USAGE, "gradients"),
    "recipe and options": (("compress", "shop:make_net", "--recipe", "r.json", "--prune", "0.3"), USAGE, "--recipe"),
    "no such recipe": (("compress", "shop:make_net", "--recipe", "none.json"), USAGE, "cannot be read"),
    "recipe is not JSON": (("compress", "shop:make_net", "--recipe", "shop.py"), USAGE, "cannot be read"),
    "recipe with unknown type": (("compress", "shop:make_net", "--recipe", "r.json"), USAGE, "Unknown type"),
    "unknown option": (("compress", "shop:make_net", "--prone", "0.3"), USAGE, "--prone"),
    "unknown command": (("squash",), USAGE, "squash"),
    "target that is none": (
        ("export", "shop:make_net", "--data", "shop:make_data", "--target", "tpu", "--out", "x"), USAGE, "tpu"),
    "artifact over a file": (("compress", "shop:make_net", "--prune", "0.3", "--out", "shop.py"), USAGE, "shop.py"),
}  # fmt: skip


@pytest.fixture
def mistakes(shop):
    for name in ("net.keras", "net.onnx", "net.pt"):
        (shop / name).write_bytes(b"\x00")
    (shop / "empty").mkdir()
    (shop / "damaged").mkdir()
    (shop / "damaged/compression.json").write_text('{"schema": 1')
    (shop / "broken.py").write_text("1 / 0")
    (shop / "script.py").write_text("raise SystemExit(0)")
    (shop / "needy.py").write_text("import no_such_package")
    (shop / "r.json").write_text('{"type": "Squeeze"}')
    return shop


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_explained(run, mistakes, name):
    arguments, code, said = CASES[name]
    before = {p: p.stat().st_mtime_ns for p in mistakes.rglob("*.*") if "__pycache__" not in str(p)}
    result = run(*arguments, code=code)
    assert said in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) <= 8
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())


def test_an_unexpected_error_is_one_line_and_how_to_see_more(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr("gracile.inspection.inspect_model", broken)
    message = run("inspect", "shop:make_net", code=1).stderr
    assert "RuntimeError: the sky fell" in message
    assert "--traceback" in message
    assert len(message.splitlines()) == 2
    assert "Traceback (most recent call last)" in run("inspect", "shop:make_net", "--traceback", code=1).stderr


def test_traceback_shows_where_the_users_factory_failed(run):
    message = run("inspect", "shop:failing", "--traceback", code=1).stderr
    assert 'raise KeyError("weights.bin")' in message
    assert "Error: 'shop:failing' failed" in message


def test_what_a_factory_prints_stays_off_stdout(run_json, run):
    assert run_json("inspect", "shop:chatty_net")["model"] == "Net"
    result = run("inspect", "shop:chatty_net")
    assert "hello" in result.stderr
    assert "hello" not in result.stdout
