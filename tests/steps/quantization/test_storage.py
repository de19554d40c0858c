"""What a runtime only stores is said before the work starts, and in the report."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.formats import NF4, Int, PerGroup, PerTensor, Ternary, W8A8Dynamic
from gracile.steps.quantization.storage import stored_only

BOTH, ORT, OV, TORCH = (gc.OnnxRuntime(), gc.OpenVINO()), gc.OnnxRuntime(), gc.OpenVINO(), gc.targets.PyTorch()
U8 = Int(8, PerTensor(), symmetric=False)


@pytest.mark.parametrize(
    "scheme",
    [
        gc.W8A8,
        gc.formats.W7A8,
        gc.W4A8,
        gc.formats.W2A2,
        gc.W4A16(32),
        gc.Scheme("own", Int(5), U8),
        gc.Scheme("w", Int(3)),
    ],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.parametrize("target", BOTH, ids=lambda target: target.name)
def test_what_runs_in_few_bits(scheme: gc.Scheme, target: gc.targets.Target) -> None:
    assert stored_only([scheme], target) is None and stored_only([scheme], None) is None


@pytest.mark.parametrize(
    ("scheme", "target", "reason"),
    [
        (gc.Scheme("nf4", NF4(PerGroup(32))), ORT, "NF4 per group of 32, which is written as floating point"),
        (gc.Scheme("own", Int(4, PerGroup(8)), U8), OV, "no kernel adds up groups"),
        (W8A8Dynamic, OV, "a scale for each token in floating point"),
        (gc.W8A8, TORCH, "decodes weights at every call"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_does_not(scheme: gc.Scheme, target: gc.targets.Target, reason: str) -> None:
    said = stored_only([gc.W4A16(32), scheme] if target is not TORCH else [scheme], target)
    assert said is not None and said.startswith(f"{target.name} does not run {scheme.name}, since")
    assert reason in said and "W4A16" not in said


def test_it_is_said_once_before_the_work_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    target = gc.targets.PyTorch()
    with caplog.at_level(logging.WARNING, "gracile"):
        model, data = nn.Sequential(nn.Linear(8, 4)).eval(), gc.Data(calibration=[torch.randn(4, 8)])
        result = gc.compress(model, gc.Recipe(gc.Quantize(Ternary())), data, target=target)
    ours = [record.message for record in caplog.records if record.name == "gracile.steps.quantize"]
    assert [message.split(":")[0] for message in ours] == ["Quantize to Ternary(granularity=PerChannel(axis=0))"]
    assert any("pytorch does not run Ternary" in note for note in result.report.steps[0].notes)
