from __future__ import annotations

import pytest
import torch
from torch import nn

from gracile.errors import ConfigError
from gracile.formats import Int, format_to_config
from gracile.nn import quantize_layer
from gracile.steps.optimizers import SGD, AdamW, default_optimizer


def test_sgd_takes_nesterov_steps_with_decay() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD(learning_rate=0.1, momentum=0.9, weight_decay=0.5).build([p])
    expected, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0):
        p.grad = torch.tensor([gradient])
        optimizer.step()
        decayed = gradient + 0.5 * expected
        velocity = 0.9 * velocity + decayed if velocity else decayed
        expected -= 0.1 * (decayed + 0.9 * velocity)
    assert p.item() == pytest.approx(expected, rel=1e-6)
    SGD(momentum=0).build([p])  # plain descent has no Nesterov step


def test_adamw_decays_apart_from_the_gradient() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.5).build([p])
    p.grad = torch.tensor([3.0])
    optimizer.step()
    assert p.item() == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)  # the first step is the sign of the gradient


def test_the_default_follows_the_net() -> None:
    assert default_optimizer(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))) == SGD()
    assert default_optimizer(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))) == AdamW()


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf"), "fast", None])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_impossible_rates_are_refused(kind: type, rate: object) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        kind(learning_rate=rate)


@pytest.mark.parametrize(("bits", "expected"), [(8, SGD()), (4, AdamW(1e-3, weight_decay=0.0))])
def test_few_bits_are_trained_by_adam(bits: int, expected: SGD | AdamW) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    fmt = Int(bits)
    tensors = {f"weight_{name}": t for name, t in fmt.encode(model[0].weight).items()}
    model[0] = quantize_layer(model[0], tensors, {"weight": format_to_config(fmt), "bias": True})
    assert default_optimizer(model) == expected
