from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
import gracile.measure
from gracile.evaluate.latency import Latency
from gracile.measure import Subject
from gracile.stopwatch import Stopwatch


def test_a_slower_machine_does_not_make_a_candidate_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    mood = [1.0]
    takes = {"full width": 4.0, "candidate": 1.0}

    def timed_call(measured: Any, batch: Any) -> float:
        return takes[measured.subject.label]

    def latency(runners: Mapping[str, float], **_: Any) -> dict[str, Latency]:
        return {
            name: Latency(p50_ms=ms * mood[0], p95_ms=ms, samples=1, ratio=1.0, ratio_low=1.0, ratio_high=1.0)
            for name, ms in runners.items()
        }

    monkeypatch.setattr(gracile.measure, "_timed_call", timed_call)
    monkeypatch.setattr(gracile.measure, "measure_latency", latency)
    watch = Stopwatch(gc.Data(calibration=[torch.randn(4, 2)]), None)
    made = []

    def reference() -> Subject:
        made.append(1)
        return subject("full width")

    def subject(label: str) -> Subject:
        return Subject(label, nn.Linear(2, 2).eval(), gc.PyTorch())

    assert watch.relative(subject("candidate"), "form", reference) == 0.25
    mood[0] = 7.0
    assert watch.relative(subject("candidate"), "form", reference) == 0.25
    assert len(made) == 1, "the reference is exported once"
    assert watch.latencies_ms([subject("full width"), subject("candidate")]) == {"full width": 28.0, "candidate": 7.0}


def test_real_calls_are_timed() -> None:
    watch = Stopwatch(gc.Data(calibration=[torch.randn(4, 2)]), 2)
    make: Callable[[], Subject] = lambda: Subject("full width", nn.Linear(2, 2).eval(), gc.PyTorch())  # noqa: E731
    assert watch.relative(Subject("candidate", nn.Linear(2, 2).eval(), gc.PyTorch()), "form", make) > 0
