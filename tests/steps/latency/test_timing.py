"""The timer against a real runtime (PyTorch) and, where figures count, one that computes its times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import nn

import gracile as gc
from gracile.context import Context
from gracile.errors import TargetError
from gracile.steps.latency.timing import Timer, timer_for


def linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).eval()


def context(**settings: Any) -> Context:
    model = linear(8)
    return Context(gc.Data(calibration=[torch.randn(4, 3)]), model, model, **settings)


def test_shares_are_of_the_model_that_was_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_a_clock(monkeypatch)
    target = Clockwork(lambda model: float(model[0].out_features))
    timer = Timer(linear(8), target, torch.randn(4, 3), tmp_path, context())
    assert timer.whole_ms == 8.0
    assert [timer.relative(linear(width)) for width in (8, 4, 12)] == [1.0, 0.5, 1.5]
    assert len(target.exported) == 4, "the whole model is exported once"


def test_a_real_runtime_is_timed_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with timer_for(gc.Latency(0.5), linear(8), context(target=gc.PyTorch()), torch.randn(4, 3)) as timer:
        assert timer is not None and timer.whole_ms > 0
        assert timer.relative(linear(4), seconds=0.01) > 0
        assert any(tmp_path.glob("gracile-*"))
    assert not any(tmp_path.glob("gracile-*"))


def test_only_a_budget_of_latency_needs_a_timer() -> None:
    for budget in (None, gc.MACs(0.5)):
        with timer_for(budget, linear(8), context(), torch.randn(4, 3)) as timer:
            assert timer is None


def test_a_model_that_cannot_be_exported_says_so(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            return self.lin(x) if float(x.sum()) > 0 else x

    with pytest.raises(TargetError, match="Branches cannot be traced"):
        Timer(Branches().eval(), gc.PyTorch(), torch.ones(4, 3), tmp_path, context())
