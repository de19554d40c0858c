"""Copies that read a model's parameters: what is theirs, what is not, and what a cut of a whole model allocates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.evaluate.size import state_bytes
from gracile.recipe import Step
from gracile.report.model import StepRecord
from gracile.sharing import own_parameters, share_parameters, tied_groups
from tests.labels import label
from tests.memory import peak_bytes


def places(model: nn.Module) -> list[int]:
    return [p.untyped_storage().data_ptr() for p in model.parameters()]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight


def test_a_copy_reads_the_numbers_of_the_parameters_and_has_all_else_of_its_own() -> None:
    model = Tied()
    twin = share_parameters(model)
    assert places(twin) == places(model)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    assert twin.head.weight is twin.embed.weight
    twin.requires_grad_(False).eval()
    twin.norm.running_mean.add_(1.0)  # type: ignore[union-attr,operator]
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert torch.equal(model.norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]


def test_parameters_of_its_own_stay_tied_and_those_it_had_stay_where_they_are() -> None:
    model = Tied()
    twin = share_parameters(model)
    twin.head.bias = nn.Parameter(torch.ones(7))
    kept = twin.head.bias.data_ptr()
    own_parameters(twin, model)
    assert not set(places(twin)) & set(places(model))
    assert twin.head.weight is twin.embed.weight and twin.head.bias.data_ptr() == kept
    assert torch.equal(twin.embed.weight, model.embed.weight)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


def stack(width: int = 8, blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    start = nn.Linear(4, width), nn.BatchNorm1d(width)
    return nn.Sequential(*start, *(Residual(width) for _ in range(blocks)), nn.Linear(width, 3))


class Doubled(Step):
    """Writes into every parameter it is given."""

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2.0)
        return StepRecord(step={}, title="doubled", seconds=0.0)


STEPS = (
    gc.Prune(0.25, pattern=gc.Channels()),
    gc.Prune(0.25, pattern=gc.Channels(), correct=False),
    gc.Prune(0.25, pattern=gc.Channels(), repair=gc.solvers.LeastSquares()),
    gc.Prune(0.25, pattern=gc.Layers(), repair=gc.solvers.LeastSquares()),
    gc.Prune(0.25, pattern=gc.Layers(), correct=False),
    gc.Prune(0.25),
    gc.Quantize(gc.W8A8),
    gc.Quantize(gc.W8A8, equalize=gc.equalize.CrossLayer(), exclude=("2.*",)),
    gc.Quantize(gc.W4A8, solver=gc.solvers.GPTQ()),
    gc.Quantize(gc.W8A16, correct=False),
    Doubled(),
)


@pytest.mark.parametrize("first", STEPS, ids=label)
@pytest.mark.parametrize("second", [None, Doubled()], ids=label)
def test_no_step_and_no_use_of_the_result_reaches_the_model_given(first: Step, second: Step | None) -> None:
    """Steps that get the model's own numbers, and a step that writes behind them."""
    model = stack()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = gc.Data(calibration=[torch.randn(32, 4) for _ in range(3)])
    steps = gc.Recipe(first, second) if second is not None else first
    result = gc.compress(model, steps, data)
    assert not set(places(result.model)) & set(places(model))
    with torch.no_grad():
        for p in result.model.parameters():
            p.fill_(7.0)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_cut_allocates_little_more_than_its_result() -> None:
    """The result is 0.73 of the model's bytes; each deep copy of the model on the way would add 1.0."""
    model = stack(256)
    data = gc.Data(calibration=[torch.randn(8, 4) for _ in range(2)])
    results = []
    peak = peak_bytes(lambda: results.append(gc.compress(model, gc.Prune(0.25, pattern=gc.Channels()), data)))
    size = state_bytes(model)
    assert state_bytes(results[0].model) < 0.75 * size
    assert peak < 1.3 * size


def test_rounding_allocates_little_more_than_its_result() -> None:
    """The result is 0.26 of the model's bytes; a deep copy on the way, or all weights decoded, would add 1.0."""
    model = stack(128, blocks=32)
    data = gc.Data(calibration=[torch.randn(8, 4) for _ in range(2)])
    results = []
    peak = peak_bytes(lambda: results.append(gc.compress(model, gc.Quantize(gc.W8A8), data)))
    size = state_bytes(model)
    assert state_bytes(results[0].model) < 0.27 * size
    assert peak < 0.7 * size


def test_groups_of_modules_with_one_parameter() -> None:
    net = Tied()
    assert tied_groups(net) == tied_groups(net, "weight") == [["embed", "head"]]
    net.head.bias = nn.Parameter(torch.zeros(7))
    net.other = nn.Linear(4, 7)
    net.other.bias = net.head.bias
    assert tied_groups(net, "weight") == [["embed", "head"]]
    assert tied_groups(net) == [["embed", "head"], ["head", "other"]]
    assert tied_groups(nn.Linear(3, 3, bias=False)) == []
