"""Cross-layer equalization: which layers are pairs, that the function stays, and that it is kept where it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Data
from gracile.equalize import CrossLayer
from gracile.errors import ConfigError, DataError
from gracile.formats import W8A8, W8A16, Int, PerTensor
from gracile.goal import Bytes
from gracile.graph import trace
from gracile.stats.match import output_error
from gracile.steps import Quantize
from gracile.steps.quantization.equalize_layers import equalize_layers


class Separable(nn.Module):
    """Pairs through ReLU and pooling; a sum, a sigmoid, ReLU6, a flattening and grouped channels are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(16, 8, 1, bias=False)
        self.added = nn.Conv2d(8, 8, 1)
        self.capped = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.curved = nn.Linear(32, 12)
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        x = self.pointwise(torch.relu(self.depthwise(x)))
        x = x + self.added(x)
        x = torch.relu(self.grouped(nn.functional.relu6(self.capped(x))))
        x = torch.sigmoid(self.curved(nn.functional.avg_pool2d(x, 2).flatten(1)))
        y: Tensor = self.second(nn.functional.leaky_relu(self.first(x)))
        return y


class Chain(nn.Module):
    """The pairs of `Separable` and a head, so that the output shows what happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(x))))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def separable(spread: float = 0.0, kind: type[nn.Module] = Separable) -> Any:
    torch.manual_seed(0)
    net: Any = kind().eval()
    with torch.no_grad():  # channels of very different sizes, of one function
        for first, second in ((net.stem, net.depthwise), (net.depthwise, net.pointwise)):
            sizes = torch.exp(spread * torch.randn(first.out_channels))
            first.weight.mul_(sizes.view(-1, 1, 1, 1))
            first.bias.mul_(sizes)
            if second.groups > 1:
                second.weight.div_(sizes.repeat_interleave(2).view(-1, 1, 1, 1))
            else:
                second.weight.div_(sizes.view(1, -1, 1, 1))
    return net


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(9)]


def context(model: nn.Module) -> Context:
    original = copy.deepcopy(model)
    return Context(Data(calibration=batches()), original, original)


def test_pairs_have_nothing_between_them_that_scaling_would_change() -> None:
    traced = trace(separable(), lambda net: net(batches()[0]))
    assert set(traced.homogeneous_pairs()) == {
        ("stem", "depthwise"),
        ("depthwise", "pointwise"),
        ("first", "second"),
    }


def test_the_function_stays_and_channels_come_to_equal_ranges() -> None:
    model = separable(1.5).double()
    x = batches()[0].double()
    with torch.no_grad():
        before = model(x)
    traced = trace(model, lambda net: net(x))
    changed = equalize_layers(model, {name for name, _ in model.named_modules()}, traced, CrossLayer())
    assert set(changed) == {"stem", "depthwise", "pointwise", "first", "second"}
    with torch.no_grad():
        assert float((model(x) - before).abs().max()) < 1e-10 * float(before.abs().max())
    made = model.depthwise.weight.flatten(1).abs().amax(1)
    read = model.pointwise.weight.abs().amax((0, 2, 3))
    assert torch.allclose(made, read, rtol=5e-3)  # until no factor is off by more than a thousandth


def test_layers_outside_the_selection_are_left() -> None:
    model, like = separable(1.0), separable(1.0)
    traced = trace(model, lambda net: net(batches()[0]))
    assert equalize_layers(model, {"stem", "pointwise"}, traced, CrossLayer()) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), like.state_dict().values()))


@pytest.mark.parametrize("scheme", [Int(8, PerTensor()), W8A8], ids=["weights per tensor", "W8A8"])
def test_it_helps_where_channels_differ(scheme: object) -> None:
    errors = {}
    for equalize in (None, CrossLayer()):
        model = separable(1.5, Chain)
        record = Quantize(scheme, equalize=equalize, correct=False)(model, context(model))  # type: ignore[arg-type]
        errors[equalize] = output_error(model, separable(1.5, Chain), Data(calibration=batches()), batches())
    assert errors[CrossLayer()] < 0.7 * errors[None]
    assert any("was kept" in note for note in record.notes)
    assert {row.name for row in record.layers if row.action == "equalized"} >= {"stem", "depthwise", "pointwise"}


def test_a_model_without_pairs_is_quantized_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2))
    original = copy.deepcopy(model)
    data = Data(calibration=[torch.randn(8, 8) for _ in range(3)])
    record = Quantize(W8A8, equalize=CrossLayer())(model, Context(data, original, original))
    assert any("no two layers follow" in note for note in record.notes)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="sweeps"):
        CrossLayer(sweeps=0)
    with pytest.raises(ConfigError, match="judged by one scheme"):
        Quantize(to=Bytes(0.5), options=(W8A8, Int(4)), equalize=CrossLayer())
    model = separable()
    with pytest.raises(DataError, match="equalizes layers"):
        Quantize(W8A16, equalize=CrossLayer())(model, Context(Data(), model, model))
