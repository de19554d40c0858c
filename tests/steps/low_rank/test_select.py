"""Which layers may be factorized: awkward forwards, each with the reason that it leaves layers whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gracile as gc
from gracile.context import Context
from gracile.errors import NothingChangedError
from gracile.graph import trace
from gracile.nn import Factorized
from gracile.recipe import Recorder
from gracile.steps.low_rank.select import Candidate, Rank, factorize_at_random, select_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))


class ByKind(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = 2 * y if type(self.b) is nn.Linear else y
        z: Tensor = self.c(torch.relu(self.b(y)))
        return z


class Breaks(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert "in_features" in self.b.__dict__  # an attribute of an nn.Linear, and a property of other layers
        z: Tensor = self.c(torch.relu(self.b(self.a(x))))
        return z


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.c(torch.relu(self.b(input=self.a(x))))
        return z


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.c(self.b(torch.relu(self.b(self.a(x)))))
        return z


class Sometimes(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z: Tensor = self.c(self.b(y) if float(x[0, 0]) > 0 else y)
        return z


class Functional(Net):
    """The weight of b is read, and b never called; that of a is read and a is called, too, which is no obstacle."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(torch.relu(self.a(x)), self.b.weight, self.b.bias)
        z: Tensor = self.c(y + F.linear(x, self.a.weight))
        return z


class Computed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = parametrizations.weight_norm(self.b)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.c(self.b(torch.relu(self.a(x))))
        return z


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)
        self.other.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.c(self.other(self.b(torch.relu(self.a(x)))))
        return z


def batches() -> list[Tensor]:
    return [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(9)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByKind, "the factorized model computes something else"),
        (Breaks, "the factorized model does not run"),
        (ByKeyword, "given by keyword"),
        (Twice, "called 2 times in one forward"),
        (Sometimes, "not called on every calibration batch"),
        (Functional, "by another module's forward"),
        (Computed, "computed from other parameters"),
        (Tied, "another module holds its weight too"),
    ],
)
def test_a_layer_that_cannot_be_replaced_is_left_whole_and_the_others_are_not(kind: type[Net], reason: str) -> None:
    model = kind().eval()
    wanted = {name: value.clone() for name, value in model.b.named_parameters()}
    result = gc.compress(model, gc.Factorize(0.6, correct=False), gc.Data(calibration=batches()))
    skipped = {row.name: row.reason or "" for row in result.report.steps[0].layers if row.action == "skipped"}
    assert reason in skipped.pop("b") and set(skipped) <= {"other"}
    net: Any = result.model
    assert isinstance(net.a, Factorized) and isinstance(net.c, Factorized)
    assert all(torch.equal(value, wanted[name]) for name, value in net.b.named_parameters())
    assert result.report.steps[0].numbers["factorized_error"] < 1e-10


class Routed(nn.Module):
    """Which tokens an expert sees depends on what the layer before computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.router = nn.Linear(16, 16), nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


def test_experts_that_get_other_tokens_than_in_the_original_are_decomposed_as_they_were() -> None:
    step = gc.Factorize(0.7, exclude=("router",), levels=2)
    result = gc.compress(Routed().eval(), step, gc.Data(calibration=batches()))
    rows = {row.name: row.reason for row in result.report.steps[0].layers if row.action == "factorized"}
    assert set(rows) == {"before", "experts.0", "experts.1"}
    assert rows["experts.0"] == rows["experts.1"] == "decomposed as it was"


def test_a_model_that_is_a_layer_and_one_of_other_layers_have_nothing_to_factorize() -> None:
    data = gc.Data(calibration=[torch.randn(4, 6, 16)])
    with pytest.raises(NothingChangedError, match="model: the model is itself a layer"):
        gc.compress(nn.Linear(16, 16).eval(), gc.Factorize(0.3), data)
    convolutions = nn.Sequential(
        nn.Conv1d(6, 6, 3, groups=2),
        nn.ConvTranspose1d(6, 6, 3),
        nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular"),
    )
    with pytest.raises(
        NothingChangedError, match=r"0: a convolution of 2 groups\n  1: .*\n  2: the inputs of this Conv1d"
    ):
        gc.compress(convolutions.eval(), gc.Factorize(0.3), data)


def test_sizes_of_a_candidate() -> None:
    """60 x 40: at rank 23 the factors have 2300 weights, at 24 as many as the layer."""
    candidate = Candidate("a", "Linear", 60, 40, 2400, 4)
    assert candidate.largest_rank() == 23 and candidate.weights_at(Rank(24)) == candidate.weights == 2400
    assert candidate.full_rank() == 40
    assert Candidate("b", "Linear", 1, 64, 64, 4).largest_rank() == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_of_a_convolution_split_along_its_sides(transposed: bool) -> None:
    """5 x 3 over 4 channels to 6, from 12 x 20 positions to 6 x 5: the first has the input's extent along j."""
    layer = nn.Conv2d(4, 6, (5, 3), stride=(2, 4), padding=(2, 1), bias=False)
    with torch.no_grad():  # filters that are one column each, or one row each, decide what is split first
        side = torch.randn(6, 4, 3 if transposed else 5, generator=torch.Generator().manual_seed(0))
        layer.weight.copy_(side[:, :, None, :].expand(6, 4, 5, 3) if transposed else side[..., None].expand(6, 4, 5, 3))
        layer.weight.add_(0.01 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(180, 2)).eval()
    traced = trace(model, lambda net: net(torch.randn(1, 4, 12, 20)))
    step, batch = gc.Factorize(0.3), torch.randn(1, 4, 12, 20)
    context = Context(gc.Data(calibration=[batch]), model, model)
    candidate = select_layers(model, traced, step, context, [batch], Recorder(step))[0]
    net, _ = factorize_at_random(model, {candidate: Rank(2, True)}, torch.Generator().manual_seed(0))
    replaced: Any = net.get_submodule("0")
    assert candidate.weights_at(Rank(2, True)) == sum(p.numel() for p in replaced.parameters())
    counted = trace(net, lambda m: m(torch.randn(1, 4, 12, 20))).macs - 360
    assert candidate.macs_at(Rank(2, True)) == counted
    assert candidate.full_rank(True) == min(replaced.first.weight[0].numel(), replaced.second.weight[:, 0].numel())
    assert candidate.transposed == (replaced.first.weight.shape[2] == 1)
