"""Widths from loss tables: what a budget counts decides which group is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.allocate import Level, MeasuredLoss
from gracile.context import Context
from gracile.graph import trace
from gracile.steps.pruning.units import ScoredGroups
from gracile.steps.pruning.widths import share_out, weights_per_unit

IMAGES = torch.zeros(2, 3, 16, 16)


def net() -> nn.Module:
    """Eight channels of 16 x 16 pixels and 64 neurons; a unit of either is eight numbers."""
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).eval()


@pytest.mark.parametrize(("budget", "cut"), [(gc.MACs(0.8), "0"), (gc.Parameters(0.9), "5"), (gc.Bytes(0.9), "5")])
def test_what_the_budget_counts_is_what_a_width_saves(budget: Any, cut: str) -> None:
    """A neuron costs 0.009 and saves 7 multiply-accumulates, a channel 0.01 and 1,792; both save eight numbers."""
    model = net()
    traced = trace(model, lambda m: m(IMAGES))
    groups = [traced.group("0"), traced.group("5")]
    assert [weights_per_unit(model, group) for group in groups] == [8, 8]
    tables = {
        "0": [Level(n, 0.01 * n, 1792.0 * n) for n in range(1, 8)],
        "5": [Level(n, 0.009 * n, 7.0 * n) for n in range(1, 64)],
    }
    scores = {group.name: torch.arange(group.units) for group in groups}
    step = gc.Prune(to=budget, pattern=gc.Channels(), allocation=MeasuredLoss(power=1.0))
    context = Context(gc.Data(calibration=[IMAGES]), model, model)
    scored = ScoredGroups(model, traced, IMAGES, groups, scores)
    keep = share_out(tables, MeasuredLoss(power=1.0), scored, step, context)
    assert list(keep) == [cut]
