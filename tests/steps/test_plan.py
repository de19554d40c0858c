"""A plan says what the step would do, and does nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.errors import ConfigError
from gracile.graph import trace


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def data() -> gc.Data:
    return gc.Data(calibration=[torch.randn(32, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)])


@pytest.mark.parametrize(
    "step",
    [
        gc.Prune(0.5, pattern=gc.Channels(), exclude=("2",)),
        gc.Prune(to=gc.MACs(0.5), pattern=gc.Channels(), criterion=gc.criteria.Random()),
        gc.Prune(0.5, pattern=gc.Channels(), criterion=gc.criteria.OBS(), repair=gc.solvers.LeastSquares()),
        gc.Prune(0.5),
    ],
    ids=str,
)
def test_the_plan_is_what_compress_then_does(step: Any) -> None:
    model, before = net(), copy.deepcopy(net().state_dict())
    plan = step.plan(model, data(), seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = gc.compress(model, step, data(), seed=3)
    assert plan.layers == result.report.steps[0].layers and plan.edits == result.report.steps[0].edits
    x = torch.zeros(32, 6)
    for label, found in (("before", model), ("after", result.model)):
        assert plan.numbers[f"parameters_{label}"] == sum(p.numel() for p in found.parameters())
        assert plan.numbers[f"macs_{label}"] == trace(found, lambda m: m(x)).macs


def test_what_cannot_be_done_is_said_before_anything_happens() -> None:
    with pytest.raises(ConfigError, match="cannot be met"):
        gc.Prune(to=gc.MACs(0.001), pattern=gc.Channels()).plan(net(), data())
