from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context, Progress
from gracile.criteria import Hessian, Magnitude, Taylor
from gracile.data import Data
from gracile.errors import DataError
from gracile.layer_stats import LayerStats
from gracile.losses import cross_entropy
from gracile.steps.pruning.scores import score_weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def context(model: nn.Module, **settings: Any) -> Context:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    data = Data(calibration=[x], train=[(x, torch.arange(10) % 3)], loss=cross_entropy)
    original = copy.deepcopy(model)
    return Context(data, original, original, **settings)


@dataclass(frozen=True)
class Wanda:
    """|w| · ‖x‖, a criterion of the user's own that reads what goes into a layer, and gradients too."""

    needs = frozenset({"input_sq_mean", "gradient"})

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        assert stats.input_sq_mean is not None and stats.gradient is not None
        return weight.abs() * stats.input_sq_mean.sqrt().float() + 0 * stats.gradient


def test_a_criterion_gets_the_statistics_that_it_asks_for() -> None:
    model = net()
    ctx = context(model)
    scores = score_weights(model, ["0.weight", "2.weight"], Wanda(), ctx, 10)
    x = ctx.data.calibration_batches[0]  # type: ignore[index]
    with torch.no_grad():
        for name, inputs in (("0.weight", x), ("2.weight", model[:2](x))):
            expected = model.get_parameter(name).abs() * inputs.square().mean(0).sqrt()
            torch.testing.assert_close(scores[name], expected)


def test_magnitude_needs_no_data() -> None:
    model = net()
    scores = score_weights(model, ["0.weight"], Magnitude(), Context(Data(), model, model), 10)
    assert torch.equal(scores["0.weight"], model[0].weight.detach().abs())


def test_probes_follow_the_run_s_seed() -> None:
    model = net()
    found = [
        score_weights(model, ["0.weight"], Hessian(hutchinson_probes=1), context(model, seed=s), 10)["0.weight"]
        for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_more_probes_come_closer_to_the_diagonal() -> None:
    """Of a softmax classifier: d²L/dw_ij² = mean p_i (1 − p_i) x_j²."""
    model = nn.Sequential(nn.Linear(4, 3))
    ctx = context(model)
    x = ctx.data.calibration_batches[0]  # type: ignore[index]
    p = model(x).softmax(1).detach()
    curvature = ((p * (1 - p))[:, :, None] * x.square()[:, None, :]).mean(0)
    expected = 0.5 * model[0].weight.detach().square() * curvature
    errors = [
        float((score_weights(model, ["0.weight"], Hessian(n), ctx, 10)["0.weight"] - expected).square().mean())
        for n in (1, 400)
    ]
    assert errors[1] < errors[0] / 20  # the variance falls with the number of probes, here 400


def test_damaged_weights_are_named() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(DataError, match=r"'2\.weight' holds NaN or infinity"):
        score_weights(model, ["0.weight", "2.weight"], Magnitude(), context(model), 10)


def test_progress_counts_examples() -> None:
    told: list[Progress] = []
    model = net()
    score_weights(model, ["0.weight"], Taylor(), context(model, on_progress=told.append), 7)
    assert [p.done for p in told] == list(range(1, 8)) and {p.total for p in told} == {7}
