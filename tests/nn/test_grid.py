"""Training on a grid: what is trained is exactly what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gracile.formats import FixedPoint, Format, Int, PerGroup, PerTensor, format_to_config
from gracile.nn import begin_training, end_training, quantize_layer
from gracile.nn.grid import on_grid

FORMATS = [
    Int(8),
    Int(4),
    Int(4, PerGroup(4)),
    Int(2, PerTensor()),
    Int(5, symmetric=False),
    Int(3, PerGroup(4), symmetric=False),
    FixedPoint(16),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def net(fmt: Format) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    for index in (0, 2):
        tensors = {f"weight_{name}": t for name, t in fmt.encode(model[index].weight).items()}
        model[index] = quantize_layer(model[index], tensors, {"weight": format_to_config(fmt)})
    return model


@each_format
def test_beginning_and_ending_changes_nothing(fmt: Format) -> None:
    model = net(fmt)
    before = copy.deepcopy(model.state_dict())
    begin_training(model)
    end_training(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_format
def test_what_was_trained_is_exactly_what_is_stored(fmt: Format) -> None:
    model, x = net(fmt), torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    original = model(x).detach()
    scales = [model[i].weight_scale.clone() for i in (0, 2) if hasattr(model[i], "weight_scale")]
    begin_training(model)
    assert torch.equal(model(x), original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained, weight = model(x).detach(), model[0].decoded_weight().detach().clone()
    assert not torch.equal(trained, original)
    end_training(model)
    assert torch.equal(model(x), trained)
    assert torch.equal(model[0].decoded_weight(), weight)
    assert scales == [] or all(
        torch.equal(a, b) for a, b in zip(scales, (model[0].weight_scale, model[2].weight_scale))
    )
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "2.bias"]


def test_gradients_pass_inside_the_grid_and_stop_outside() -> None:
    fmt = Int(4, PerTensor())
    weight = torch.tensor([[-9.0, -7.6, 0.2, 6.9, 7.4, 8.1]], requires_grad=True)
    encoded = {"scale": torch.tensor(1.0)}
    found = on_grid(weight, fmt, encoded)
    assert found.tolist() == [[-8.0, -8.0, 0.0, 7.0, 7.0, 7.0]]
    (found * torch.arange(1.0, 7.0)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0, 0.0]]


@each_format
def test_zeros_stay_exactly_zero(fmt: Format) -> None:
    layer = nn.Linear(8, 6)
    layer.weight.data[:, ::2] = 0.0
    tensors = {f"weight_{name}": t for name, t in fmt.encode(layer.weight).items()}
    new = quantize_layer(layer, tensors, {"weight": format_to_config(fmt)})
    begin_training(new)
    assert not new.decoded_weight()[:, ::2].any()
    end_training(new)
    assert not new.decoded_weight()[:, ::2].any()
