"""gracile evaluate, export, bench, report and doctor."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

DATA = ("--data", "shop:make_data")


def test_quality_of_the_net_that_made_the_labels_is_one(run_json):
    found = run_json("evaluate", "shop:make_net", *DATA)
    assert found["quality"]["value"] == 1.0
    assert found["quality"]["examples"] == 96
    assert found["quality"]["low"] < 1.0  # 96 right answers do not prove perfection
    assert found["target"] == "pytorch reference"


def test_quality_on_a_target_comes_with_latency(run_json, run):
    pytest.importorskip("onnxruntime")
    found = run_json("evaluate", "shop:make_net", *DATA, "--target", "onnxruntime")
    assert found["quality"]["value"] == 1.0
    assert found["latency_p50_ms"] > 0
    assert "95 % interval" in run("evaluate", "shop:make_net", *DATA).stdout


def test_quality_needs_something_to_judge_by(run):
    assert "nothing to judge by" in run("evaluate", "shop:make_net", "--data", "shop:calibration_only", code=1).stderr


def test_the_exported_file_computes_what_the_net_does(run_json, shop):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = run_json("export", "shop:make_net", *DATA, "--target", "onnxruntime", "--out", "made/net.onnx")
    assert found["parity"]["agreement"] == 1.0
    assert found["size_bytes"] == (shop / "made/net.onnx").stat().st_size
    x = torch.randn(5, 1, 6, 6)
    session = onnxruntime.InferenceSession(str(shop / "made/net.onnx"))
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = sys.modules["shop"].make_net()(x).numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-5)  # float32 sums of at most 72 terms of order 1


def test_bench_times_every_target_at_every_batch_size(run_json, run):
    pytest.importorskip("onnxruntime")
    command = ("bench", "shop:make_net", *DATA, "--targets", "onnxruntime,pytorch", "--threads", 1, "--seconds", 0.1)
    rows = run_json(*command, "--batch-sizes", "1,24")
    assert [(row["target"], row["batch_size"]) for row in rows] == [
        ("onnxruntime", 1),
        ("pytorch", 1),
        ("onnxruntime", 24),
        ("pytorch", 24),
    ]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["threads"] == 1
        first = next(r for r in rows if r["batch_size"] == row["batch_size"])
        assert row["ratio"] == pytest.approx(first["p50_ms"] / row["p50_ms"])  # the definition of the ratio
    assert "times as fast" in run(*command, "--batch-sizes", 1).stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--targets", "tensorrt"), "no target 'tensorrt'"),
        (("--targets", "onnxruntime:bf16"), "precision"),
        (("--targets", "pytorch:bf16"), "one precision"),
        (("--batch-sizes", "1,x"), "whole numbers"),
        (("--batch-sizes", "0"), "whole numbers"),
    ],
)
def test_bench_refuses_what_there_is_not(run, options, said):
    assert said in run("bench", "shop:make_net", *DATA, *options, code=2).stderr


def test_an_absent_target_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    message = run("bench", "shop:make_net", *DATA, "--targets", "openvino", code=1).stderr
    assert "pip install 'gracile[openvino]'" in message


def test_a_saved_report_is_shown_again(run, run_json):
    first = run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "slim").stdout
    assert run("report", "slim").stdout == first
    assert run_json("report", "slim")["report"]["title"].startswith("Net")


def test_open_starts_a_browser_with_the_page(run, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", lambda url: opened.append(url) or 0)
    run("compress", "shop:make_net", *DATA, "--prune", 0.5, "--out", "slim")
    run("report", "slim", "--open")
    assert len(opened) == 1
    assert opened[0].startswith("file://")
    assert opened[0].endswith("slim/report.html")


def test_where_there_is_no_report_it_says_so(run):
    assert "No report can be read" in run("report", "nowhere", code=1).stderr


def test_doctor_lists_what_is_there(run, run_json):
    found = {finding["name"]: finding for finding in run_json("doctor")}
    assert found["torch"]["state"] == "ok"
    assert torch.__version__ in found["torch"]["detail"]
    assert "torch" in run("doctor").stdout
