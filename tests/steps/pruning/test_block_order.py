"""Blocks chosen after repair: which goes first, and that the choice is never worse than one without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from residual import ResidualMLP
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.context import Context


def disagreeing() -> ResidualMLP:
    """The block that costs least as it stands is not the one that costs least once the rest is refitted."""
    return ResidualMLP(scales=(1, 1.5, 1, 1.2, 1), seed=2)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator) for _ in range(16)]


def held_out_kl(model: nn.Module) -> float:
    x = torch.cat(batches()[::8])
    with torch.no_grad():
        found, expected = (net(x).double().log_softmax(1) for net in (model, disagreeing().eval()))
    return float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))


def removed_with(repair: Any, pattern: gc.Layers, amount: float, among: str = "blocks.*") -> tuple[set[str], float]:
    """Blocks removed, and what the repaired model loses on the batches that no repair has seen."""
    model = disagreeing().eval()
    context = Context(gc.Data(calibration=batches()), copy.deepcopy(model), model)
    record = gc.only(among, gc.Prune(amount, pattern=pattern, repair=repair))(model, context)
    return {row.name for row in record.layers if row.action == "removed"}, held_out_kl(model)


def test_with_a_repair_the_block_goes_whose_repaired_model_diverges_least() -> None:
    """Against each block alone, by a step that may remove no other."""
    repair = gc.solvers.LeastSquares()
    alone = {f"blocks.{i}": removed_with(repair, gc.Layers(), 0.99, f"blocks.{i}")[1] for i in range(5)}
    names, loss = removed_with(repair, gc.Layers(candidates=5), 0.2)
    assert names == {min(alone, key=alone.__getitem__)} and loss == pytest.approx(min(alone.values()), rel=1e-6)
    before, loss_before = removed_with(repair, gc.Layers(candidates=1), 0.2)
    assert before != names and before == removed_with(None, gc.Layers(), 0.2)[0] and loss < loss_before


@pytest.mark.parametrize("amount", [0.2, 0.4, 0.6])
def test_a_choice_after_repair_is_never_worse_than_one_before(amount: float) -> None:
    repair = gc.solvers.LeastSquares()
    losses = [removed_with(repair, gc.Layers(candidates=count), amount)[1] for count in (1, 2, 4)]
    assert losses[1] <= losses[0] and losses[2] <= losses[0]
