from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import nn

from gracile.context import Context
from gracile.data import Data
from gracile.errors import ConfigError
from gracile.goal import Bytes, Latency, MACs, Parameters
from gracile.patterns import Channels
from gracile.steps import Prune


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(864, 5),
    ).eval()


def context(model: nn.Module, **data: Any) -> Context:
    original = copy.deepcopy(model)
    batches = [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return Context(Data(**({"calibration": batches} | data)), original, original)


def macs(model: Any) -> int:
    """By hand, from the sizes of the layers."""
    a, b = model[0].out_channels, model[2].out_channels
    return 36 * (3 * 9 * a + a * 9 * b) + 36 * b * 5


def parameters(model: Any) -> int:
    a, b = model[0].out_channels, model[2].out_channels
    return 28 * a + (9 * a + 1) * b + 36 * b * 5 + 5


COSTS = [(MACs, macs), (Parameters, parameters), (Bytes, lambda model: 4 * parameters(model))]


@pytest.mark.parametrize(("kind", "cost"), COSTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("amount", [0.8, 0.5, 0.2, "absolute"])
def test_a_budget_is_met_and_one_unit_more_would_break_it(kind: Any, cost: Any, amount: Any) -> None:
    original, model = net(), net()
    limit = 0.37 * cost(original) if amount == "absolute" else amount * cost(original)
    step = Prune(to=kind(limit if amount == "absolute" else amount), pattern=Channels(), correct=False)
    step(model, context(model))
    assert cost(model) <= limit
    # Tight: the next unit of the ranking belongs to one of the two layers, and with it the budget is broken.
    larger = []
    for layer in (0, 2):
        grown = copy.deepcopy(model)
        grown[layer].out_channels += 1
        larger.append(cost(grown))
    assert max(larger) > limit


def test_what_cannot_be_reached_names_the_nearest() -> None:
    model = net()
    smallest = copy.deepcopy(model)
    smallest[0].out_channels = smallest[2].out_channels = 1
    with pytest.raises(
        ConfigError, match=f"nearest that can be reached by cutting is {parameters(smallest)} of"
    ) as caught:
        Prune(to=Parameters(0.001), pattern=Channels())(model, context(model))
    assert "Ask for at least that" in str(caught.value)
    assert model[0].out_channels == 16
    with pytest.raises(ConfigError, match="nearest"):
        Prune(to=MACs(0.05), pattern=Channels(), exclude=("2",))(net(), context(net()))


@pytest.mark.parametrize("amount", [1e9, 1.0])
def test_a_model_within_its_budget_is_said_to_be(amount: float) -> None:
    with pytest.raises(ConfigError, match="within this budget already"):
        Prune(to=Parameters(amount), pattern=Channels())(net(), context(net()))


def test_counts_are_multiples_where_asked_within_the_budget() -> None:
    model = net()
    Prune(to=MACs(0.6), pattern=Channels(multiple_of=8), correct=False)(model, context(model))
    assert macs(model) <= 0.6 * macs(net())
    assert model[0].out_channels % 8 == 0 and model[2].out_channels % 8 == 0


def test_latency_is_measured_on_the_target_with_the_batch_as_it_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes by the width, the narrowest cut that is fast enough is found."""
    without_a_clock(monkeypatch)

    def feed(batch: Any) -> Any:
        return (batch["image"],)

    target = Clockwork(lambda model: model[2].out_channels)
    model = net()
    batch = {"image": torch.randn(2, 3, 6, 6), "labels": torch.zeros(2)}
    ctx = context(model, calibration=[batch], feed=feed)
    Prune(to=Latency(0.5, target=target), pattern=Channels(), correct=False)(model, ctx)
    assert 8 <= model[2].out_channels <= 12  # six bisections: within 1/64 of all 40 units
    assert all(isinstance(fed, tuple) and fed[0] is batch["image"] for fed in target.fed)
    assert all(given is feed for given in target.feeds)
