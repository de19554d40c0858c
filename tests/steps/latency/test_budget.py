"""Budgets of latency by tables, on a runtime whose times are computed: what is chosen can be checked exactly."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import Tensor, nn

import gracile as gc
from gracile.allocate import Level, MeasuredLoss
from gracile.errors import ConfigError, TargetError
from gracile.graph import trace
from gracile.steps.latency.budget import LatencyBudget
from gracile.steps.latency.table import LatencyTable


class Blocks(nn.Module):
    """Residual blocks of two convolutions, so that the inner widths are free, and equal but for the first."""

    def __init__(self, inner: tuple[int, ...] = (32, 32, 64)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.up = nn.ModuleList(nn.Conv2d(8, width, 3, padding=1) for width in inner)
        self.down = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1) for width in inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down):
            x = x + down(torch.relu(up(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def staircase(model: Any) -> float:
    """1 ms and, for each block, one for every begun vector of 8 channels."""
    return 1.0 + sum(float(-(-up.out_channels // 8)) for up in model.up)


def widths(model: Any) -> list[int]:
    return [up.out_channels for up in model.up]


def data() -> gc.Data:
    return gc.Data(calibration=[torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)])


def step(budget: gc.Latency, **settings: Any) -> gc.Prune:
    settings = {"exclude": ("stem",), "allocation": MeasuredLoss(multiple_of=8, rounds=0, power=1.0)} | settings
    return gc.Prune(to=budget, pattern=gc.Channels(), **settings)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)


def test_widths_are_whole_vectors_within_the_budget_and_all_figures_are_recorded() -> None:
    target = Clockwork(staircase)
    result = gc.compress(Blocks().eval(), step(gc.Latency(0.6, target=target)), data())
    record = result.report.steps[0]
    assert staircase(Blocks()) == 17.0
    assert all(width % 8 == 0 for width in widths(result.model))
    assert staircase(result.model) == 10.0  # 10.2 are allowed, in whole milliseconds
    assert record.numbers["latency_before_ms"] == 17.0
    assert record.numbers["latency_ms"] == pytest.approx(10.0)
    # Blocks do not share layers, so that the tables of single groups add up.
    assert record.numbers["latency_predicted_ms"] == pytest.approx(10.0)
    assert any("17 ms before, 10 ms after, 10.2 ms allowed, 10 ms predicted" in note for note in record.notes)


def test_equal_groups_are_timed_once_and_a_second_run_times_no_width() -> None:
    first = Clockwork(staircase)
    gc.compress(Blocks().eval(), step(gc.Latency(0.6, target=first)), data())
    tables = [widths(model) for model in first.exported[1:]]
    # Four narrower widths of 32, both groups together; eight of 64; then the cuts that are tried.
    assert tables[:4] == [[width, width, 64] for width in (24, 16, 8, 4)]
    assert tables[4:12] == [[32, 32, width] for width in (56, 48, 40, 32, 24, 16, 8, 4)]
    second = Clockwork(staircase)
    result = gc.compress(Blocks().eval(), step(gc.Latency(0.6, target=second)), data())
    assert len(second.exported) == len(first.exported) - 12
    assert any("no width had to be timed" in note for note in result.report.steps[0].notes)
    other = Clockwork(staircase)
    gc.compress(Blocks((32, 32, 32)).eval(), step(gc.Latency(0.6, target=other)), data())
    assert len(other.exported) > len(second.exported), "another structure has a table of its own"


def test_a_width_that_is_no_faster_is_not_chosen() -> None:
    """A runtime that only gains at 16 and 32 channels: the others lose units for nothing."""

    def coarse(model: Any) -> float:
        return 1.0 + sum(16.0 * -(-up.out_channels // 16) for up in model.up)

    result = gc.compress(Blocks().eval(), step(gc.Latency(0.7, target=Clockwork(coarse))), data())
    assert all(width % 16 == 0 for width in widths(result.model)), widths(result.model)


def test_widths_that_the_pattern_would_round_are_not_chosen() -> None:
    prune = gc.Prune(
        to=gc.Latency(0.7, target=Clockwork(staircase)),
        pattern=gc.Channels(multiple_of=16),
        exclude=("stem",),
        allocation=MeasuredLoss(multiple_of=8, rounds=0),
    )
    result = gc.compress(Blocks().eval(), prune, data())
    assert all(width % 16 == 0 for width in widths(result.model)) and staircase(result.model) <= 0.7 * 17


@pytest.mark.parametrize("more", [-0.4, 0.4])
def test_where_cuts_do_not_add_up_measuring_corrects_the_amount(more: float) -> None:
    """All cut together save more, or less, than the tables of single groups say."""

    def together(model: Any) -> float:
        saved = 17.0 - staircase(model)
        return 17.0 - saved * (1 + more * (saved - 4) / 16)

    result = gc.compress(Blocks().eval(), step(gc.Latency(0.6, target=Clockwork(together))), data())
    measured, predicted = (result.report.steps[0].numbers[f"latency_{name}ms"] for name in ("", "predicted_"))
    assert measured == pytest.approx(together(result.model))
    # In steps of about a millisecond: one vector more of any block would break the budget.
    assert 0.6 * 17 - 1.3 < measured <= 0.6 * 17
    assert abs(predicted - measured) > 0.1


@pytest.mark.parametrize("amount", [0.4, 0.55, 0.7, 0.85])
def test_the_widths_are_the_best_of_all_within_the_budget(amount: float) -> None:
    """Against every combination of the tables' widths, with losses that no ratio of loss to saving orders."""
    model = Blocks().eval()
    traced = trace(model, lambda net: net(torch.zeros(1, 3, 6, 6)))
    names = ["up.0", "up.1", "up.2"]
    units_of = dict(zip(names, (32, 32, 64)))

    def vectors(units: int, removed: int) -> int:
        return units // 8 - -(-(units - removed) // 8)

    generator = torch.Generator().manual_seed(1)
    tables, saved = {}, {}
    for name, units in units_of.items():
        counts = MeasuredLoss(multiple_of=8).counts(units)
        losses = torch.rand(len(counts), generator=generator).cumsum(0) ** 2
        macs = [36 * 144 * count for count in counts]
        tables[name] = [Level(c, float(loss), float(m)) for c, loss, m in zip(counts, losses, macs)]
        saved[name] = {count: vectors(units, count) / 17 for count in counts}
    timer: Any = type("Timer", (), {"whole_ms": 17.0, "relative": lambda _, net: staircase(net) / 17.0})()
    budget = LatencyBudget(gc.Latency(amount), timer, LatencyTable(saved), model, traced)

    def keep_of(removed: dict[str, int]) -> dict[str, list[int]]:
        return {n: list(range(traced.group(n).units - r)) for n, r in removed.items() if r}

    keep = budget.meet(tables, MeasuredLoss(power=1.0), keep_of)
    chosen = {name: traced.group(name).units - len(keep[name]) if name in keep else 0 for name in names}
    rows = [[Level(0, 0.0, 0.0), *tables[name]] for name in names]
    gone = [
        (sum(vectors(units, level.removed) for units, level in zip(units_of.values(), c)), c)
        for c in itertools.product(*rows)
    ]
    fits = [c for saving, c in gone if 17 - saving <= 0.985 * amount * 17]
    best = min(sum(level.loss for level in c) for c in fits)
    found = sum(next(level.loss for level in row if level.removed == chosen[n]) for n, row in zip(names, rows))
    assert found == pytest.approx(best)


@pytest.mark.parametrize("allocation", [gc.allocate.Uniform(), gc.allocate.GlobalRank(), None])
def test_other_allocations_are_bisected_to_the_budget(allocation: Any) -> None:
    budget = gc.Latency(0.6, target=Clockwork(staircase))
    result = gc.compress(Blocks().eval(), step(budget, allocation=allocation), data())
    assert 0.5 * 17 <= staircase(result.model) <= 0.6 * 17
    assert result.report.steps[0].numbers["latency_ms"] == pytest.approx(staircase(result.model))
    assert "latency_predicted_ms" not in result.report.steps[0].numbers


def test_milliseconds_and_rounds_end_within_the_budget_too() -> None:
    budget = gc.Latency(9.0, target=Clockwork(staircase), ms=True)
    settings = {"criterion": gc.criteria.OBS(), "repair": gc.solvers.LeastSquares()}
    result = gc.compress(
        Blocks().eval(), step(budget, allocation=MeasuredLoss(multiple_of=8, rounds=2), **settings), data()
    )
    assert 8.0 <= staircase(result.model) <= 9.0
    assert result.report.steps[0].numbers["allocation_loss"] > 0


def test_blocks_are_left_out_to_a_budget_of_latency() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Inner() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.lin(x))

    def cost(model: Any) -> float:
        return 1.0 + sum(isinstance(module, nn.Linear) for module in model.modules())

    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    prune = gc.Prune(to=gc.Latency(0.6, target=Clockwork(cost)), pattern=gc.Layers(), correct=False)
    result = gc.compress(Deep().eval(), prune, gc.Data(calibration=batches))
    assert cost(result.model) == 3.0
    numbers = result.report.steps[0].numbers
    assert (numbers["latency_before_ms"], numbers["latency_ms"]) == (5.0, pytest.approx(3.0))


def test_what_cannot_be_reached_names_the_nearest_and_changes_nothing() -> None:
    model = Blocks().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=re.escape("nearest that was reached by cutting is 4 ms of 17 ms (0.235)")):
        gc.compress(model, step(gc.Latency(0.1, target=Clockwork(staircase))), data(), inplace=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="within this budget already"):
        gc.compress(Blocks().eval(), step(gc.Latency(1.0, target=Clockwork(staircase))), data())


def test_a_target_that_is_absent_or_not_given_is_said_before_anything_is_measured() -> None:
    class Absent(Clockwork):
        def available(self) -> str | None:
            return "it is not installed: pip install it"

    for allocation in (MeasuredLoss(), gc.allocate.Uniform()):
        with pytest.raises(ConfigError, match="no target to measure on"):
            gc.compress(Blocks().eval(), step(gc.Latency(0.5), allocation=allocation), data())
        absent = Absent(staircase)
        with pytest.raises(TargetError, match="cannot be used here: it is not installed"):
            gc.compress(Blocks().eval(), step(gc.Latency(0.5, target=absent), allocation=allocation), data())
        assert not absent.exported


@pytest.mark.parametrize("error", [ConfigError, TargetError])
def test_widths_that_the_runtime_refuses_are_noted_and_their_groups_stay_whole(error: type[Exception]) -> None:
    class Refuses(Clockwork):
        def export(self, model: Any, *args: Any, **settings: Any) -> Any:
            if model.up[2].out_channels < 64:
                raise error("no kernel for that")
            return super().export(model, *args, **settings)

    result = gc.compress(Blocks().eval(), step(gc.Latency(0.8, target=Refuses(staircase))), data())
    assert widths(result.model)[2] == 64 and staircase(result.model) <= 0.8 * 17
    notes = result.report.steps[0].notes
    assert any("Not timed, and so left whole: up.2" in note and "no kernel" in note for note in notes)
