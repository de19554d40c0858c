"""What a repair does to a cut, and that it is taken back where it does not help."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.solvers import LeastSquares
from gracile.stats.refit import Refit


class Net(nn.Module):
    """Two convolutions with a norm between and a classifier; the hidden channels are nearly half the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.head = nn.Conv2d(12, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.b(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.a.weight[6:] = 0.5 * model.a.weight[:6] + 0.02 * torch.randn_like(model.a.weight[:6])
        model.a.bias[6:] = 0.5 * model.a.bias[:6]
        model.b.weight[:, 6:] *= 0.5
    return model


def images(seed: int, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


def error(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        x = torch.cat(images(9, 4))
        return float((a(x) - b(x)).square().sum() / b(x).square().sum())


def compressed(repair: Any, **settings: Any) -> gc.Result:
    step = gc.Prune(0.5, pattern=gc.Channels(), exclude=("b",), repair=repair, **settings)
    return gc.compress(net(), step, gc.Data(calibration=images(1)))


@pytest.mark.parametrize("correct", [True, False])
def test_a_refit_makes_good_most_of_a_cut_of_redundant_channels(correct: bool) -> None:
    original = net()
    plain, refitted = compressed(None, correct=correct), compressed(LeastSquares(), correct=correct)
    assert refitted.model.a.out_channels == plain.model.a.out_channels == 6
    assert error(refitted.model, original) < 0.2 * error(plain.model, original)
    rows = [row for row in refitted.report.steps[0].layers if row.action == "refitted"]
    assert {row.name for row in rows} == {"b", "head"}
    assert any("was kept" in note for note in refitted.report.steps[0].notes)
    corrected = [row for row in refitted.report.steps[0].layers if row.action == "corrected"]
    assert correct or not corrected


def test_a_refit_that_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from gracile.steps.pruning import repair as module

    plain = compressed(None)

    def spoil(repair: Refit, *rest: object, **settings: object) -> dict[str, str]:
        with torch.no_grad():
            repair.model.get_parameter("b.weight").mul_(-3)
        return {}

    monkeypatch.setattr(module, "refit", spoil)
    result = compressed(LeastSquares())
    for name, value in plain.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name
    assert any("was taken back" in note for note in result.report.steps[0].notes)
    assert not [row for row in result.report.steps[0].layers if row.action == "refitted"]


def test_the_original_is_not_touched_and_a_seed_gives_the_same_weights() -> None:
    original, before = net(), copy.deepcopy(net().state_dict())
    step = gc.Prune(0.5, pattern=gc.Channels(), repair=LeastSquares())
    results = [gc.compress(original, step, gc.Data(calibration=images(1)), seed=3).model for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    for a, b in zip(results[0].state_dict().values(), results[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Tied(nn.Module):
    """The classifier reads by the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(x + self.down(torch.relu(self.up(x)))).mean(1)
        return out


@pytest.mark.parametrize("criterion", [gc.Magnitude(), gc.criteria.OBS()], ids=str)
def test_a_weight_that_an_embedding_shares_is_not_refitted(criterion: Any) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    generator = torch.Generator().manual_seed(1)
    data = gc.Data(calibration=[torch.randint(0, 9, (16, 5), generator=generator) for _ in range(6)])
    step = gc.Prune(0.5, pattern=gc.Channels(), criterion=criterion, repair=LeastSquares(), exclude=("embed",))
    result = gc.compress(model, step, data)
    assert result.model.head.weight is result.model.embed.weight
    assert torch.equal(result.model.embed.weight, model.embed.weight)  # type: ignore[union-attr,arg-type]
    rows = {row.name for row in result.report.steps[0].layers if row.action == "refitted"}
    assert rows == {"down"}


class Normed(Tied):
    """With a norm within, which layers read, and one that the tied classifier alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.last = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(self.last(x + self.down(torch.relu(self.up(self.within(x))))).mean(1))
        return out


def test_the_norm_in_front_of_a_tied_head_is_refitted_and_fitted_to_the_outputs_and_no_other() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    generator = torch.Generator().manual_seed(1)
    data = gc.Data(calibration=[torch.randint(0, 9, (64, 5), generator=generator) for _ in range(8)])
    step = gc.Prune(0.5, pattern=gc.Channels(), repair=LeastSquares(), exclude=("embed",))
    result = gc.compress(model, step, data)
    record = result.report.steps[0]
    assert {row.name for row in record.layers if row.action == "refitted"} == {"down", "last"}
    assert torch.equal(result.model.within.weight, model.within.weight)  # type: ignore[union-attr,arg-type]
    (told,) = [note for note in record.notes if "fitted to the outputs" in note]
    before, after = (float(part.split()[0]) for part in told.split("batches ")[1].split("it, "))
    assert after <= before
