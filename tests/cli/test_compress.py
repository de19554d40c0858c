"""gracile compress: what the options ask for is what happened, and what is saved loads again."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import gracile as gc
from gracile.cli.compress import steps_from

DATA = ("--data", "shop:make_data")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((0.3, None, None, None, None, None), gc.Prune(0.3)),
        ((0.3, "channels", "taylor", None, None, None), gc.Prune(0.3, criterion=gc.Taylor(), pattern=gc.Channels())),
        ((None, "2:4", "hessian", None, None, None), gc.Prune(criterion=gc.Hessian(), pattern=gc.NM(2, 4))),
        ((None, None, None, None, 2, None), gc.Distill(epochs=2)),
        ((None, None, None, 0.25, None, None), gc.Factorize(0.25)),
        (
            (0.5, "heads", None, 0.3, 3, "w4a16:32"),
            gc.Recipe(
                gc.Prune(0.5, pattern=gc.Heads()), gc.Factorize(0.3), gc.Distill(epochs=3), gc.Quantize(gc.W4A16(32))
            ),
        ),
    ],
)
def test_options_become_steps_in_the_order_prune_factorize_distil_quantize(options, expected):
    assert steps_from(*options) == expected


def test_a_third_of_the_weights_becomes_zero_and_the_artifact_loads(run_json, shop):
    found = run_json("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "slim")
    model = gc.load("slim", sys.modules["shop"].Net())
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.ndim > 1])
    assert int((weights == 0).sum()) == weights.numel() // 2  # 72 + 128 + 48 = 248, an even number
    assert found["met"] is None
    assert found["run_dir"] == "slim.run"
    assert (shop / found["html"]).is_file()
    assert [step["step"]["type"] for step in found["report"]["steps"]] == ["Prune"]


def test_the_table_and_the_places_are_shown(run):
    shown = run("compress", "shop:make_net", *DATA, "--prune", 0.25, "--pattern", "channels", "--out", "slim").stdout
    for text in ("Accuracy", "MACs per example", "Model:  slim", "Report: slim/report.html"):
        assert text in shown


def test_weight_only_formats_need_no_data(run):
    run("compress", "shop:make_net", "--quantize", "w8a16", "--out", "slim")
    assert type(gc.load("slim", sys.modules["shop"].Net()).hidden).__name__ == "QuantizedLinear"


def test_a_recipe_file_gives_the_same_weights_as_the_options(run, shop):
    (shop / "recipe.json").write_text('[{"type": "Prune", "fraction": 0.5}, {"type": "Quantize", "scheme": "int8"}]')
    run("compress", "shop:make_net", *DATA, "--recipe", "recipe.json", "--out", "a")
    run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--quantize", "int8", "--out", "b")
    assert (shop / "a/model.safetensors").read_bytes() == (shop / "b/model.safetensors").read_bytes()


def test_a_saved_model_is_compressed_further_and_told_its_class(run, shop):
    run("compress", "shop:make_sized", *DATA, "--prune", 0.5, "--pattern", "channels", "--out", "a")
    message = run("compress", "a", *DATA, "--quantize", "int8", "--out", "b", code=1).stderr
    assert "Sized" in message
    run("compress", "a", "--class", "shop:make_sized", *DATA, "--quantize", "int8", "--out", "b")
    model = gc.load("b", sys.modules["shop"].make_sized())
    assert model.hidden.weight.shape[0] < 12
    assert type(model.head).__name__ == "QuantizedLinear"


def test_the_same_command_goes_on_without_redoing_finished_steps(run, shop):
    command = ("compress", "shop:make_net", *DATA, "--prune", 0.5, "--distill", 1, "--out", "slim")
    run(*command)
    steps = json.loads((shop / "slim/report.json").read_text())["steps"]
    run(*command)
    again = json.loads((shop / "slim/report.json").read_text())["steps"]
    assert [s["seconds"] for s in again] == [s["seconds"] for s in steps]  # timed anew, they would differ


def test_another_command_in_the_same_run_directory_is_refused(run):
    run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "slim")
    message = run("compress", "shop:make_net", *DATA, "--prune", 0.4, "--out", "slim", code=1).stderr
    assert "belongs to another run" in message


def test_on_a_target_both_models_are_timed_and_exported(run_json, shop):
    pytest.importorskip("onnxruntime")
    command = ("compress", "shop:make_net", *DATA, "--prune", 0.5, "--pattern", "channels", "--target", "onnxruntime")
    report = run_json(*command, "--out", "slim")["report"]
    assert report["before"][0]["latency_p50_ms"] > 0
    assert report["after"][0]["macs"] < report["before"][0]["macs"]
    assert list((shop / "slim/targets/onnxruntime").glob("*.onnx"))


def test_stopped_by_the_user_it_says_that_it_goes_on(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["gracile.compress"], "compress", interrupted)
    message = run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "slim", code=130).stderr
    assert "'slim.run' keeps what was finished" in message
    assert "same command goes on" in message


def test_a_directory_with_other_things_in_it_is_not_replaced(run, shop):
    (shop / "work").mkdir()
    (shop / "work/thesis.tex").write_text("years of work")
    message = run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "work", code=1).stderr
    assert "other things in it" in message
    assert (shop / "work/thesis.tex").read_text() == "years of work"
    assert not (shop / "work.run").exists()  # refused before any work was done
