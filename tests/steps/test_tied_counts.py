"""Groups that must keep one number of units: measured, shared out and cut as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import Tensor, nn

import gracile as gc
from gracile.allocate import MeasuredLoss
from gracile.context import Context
from gracile.data import Data
from gracile.graph import Trace, cut_macs, tied_sets, trace
from gracile.stats.match import divergence
from gracile.steps.latency.cache import LatencyCache
from gracile.steps.latency.table import measure_latency_table
from gracile.steps.latency.timing import Timer
from gracile.steps.pruning.consumers import collect_consumers
from gracile.steps.pruning.tables import measure_tables
from gracile.steps.pruning.units import ScoredGroups


class Halves(nn.Module):
    """Two halves of one layer, so of equal size: one layer reads both, another the second alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.own, self.both = nn.Linear(6, 32), nn.Linear(16, 5), nn.Linear(32, 5)
        self.mlp = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, dim=1)
        mixed = self.both(torch.cat((torch.tanh(first), torch.relu(second)), dim=1))
        y: Tensor = self.mlp(mixed + self.own(second))
        return y


def data() -> Data:
    generator = torch.Generator().manual_seed(2)
    return Data(calibration=[torch.randn(64, 6, generator=generator) for _ in range(4)])


def traced(model: nn.Module) -> Trace:
    return trace(model, lambda net: net(data().calibration[0]))


def work(model: Any) -> float:
    """1 ms, and one for every begun 4 units of a half and of the perceptron."""
    return 1.0 + -(-model.own.in_features // 4) + -(-model.mlp[0].out_features // 4)


def test_the_loss_of_a_set_is_that_of_all_its_groups_cut_and_all_readers_refitted() -> None:
    model, examples = Halves().eval(), data()
    found = traced(model)
    groups = [g for g in found.groups if g.frozen is None and g.units == 16 and g.tied_count is not None]
    assert [g.name for g in groups] == ["stem", "stem#2"] and list(tied_sets(groups)) == ["stem"]
    context = Context(examples, model, model)
    scores = {g.name: torch.rand(16, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(groups)}
    consumers = collect_consumers(model, found, groups, context)
    scored = ScoredGroups(model, found, examples.calibration[0], groups, scores, consumers)
    tables = measure_tables(scored, MeasuredLoss(levels=4), context)
    assert list(tables) == ["stem"]
    level = tables["stem"][2]
    keep = {name: value.argsort()[12:].sort().values.tolist() for name, value in scores.items()}
    assert level.removed == 12 and level.saved == found.macs - cut_macs(found, keep)
    # By another way: each reader regressed with an intercept on what it still reads, ridge left out.
    with torch.no_grad():
        x = torch.cat(list(examples.calibration))
        first, second = model.stem(x).chunk(2, dim=1)
        first, second = torch.tanh(first), second
        both = torch.cat((first[:, keep["stem"]], torch.relu(second)[:, keep["stem#2"]]), dim=1)
        whole = torch.cat((first, torch.relu(second)), dim=1)
        mixed = regressed(both, model.both(whole)) + regressed(second[:, keep["stem#2"]], model.own(second))
        brute = divergence([model.mlp(mixed)], [model(x)])
    assert level.loss == pytest.approx(brute, rel=0.1)  # the ridge is a hundredth of the inputs' variance


def regressed(inputs: Tensor, outputs: Tensor) -> Tensor:
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    return (inputs @ torch.linalg.lstsq(inputs, outputs.double()).solution).float()


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize(
    "amount", [gc.MACs(0.6), gc.Parameters(0.6), gc.Latency(0.6, target=Clockwork(work)), 0.4], ids=str
)
def test_widths_of_a_set_agree_and_meet_the_amount(amount: Any, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)
    model = Halves().eval()
    settings: dict[str, Any] = {"fraction": amount} if isinstance(amount, float) else {"to": amount}
    step = gc.Prune(
        **settings,
        pattern=gc.Channels(),
        criterion=gc.criteria.OBS(),
        repair=gc.solvers.LeastSquares(),
        allocation=MeasuredLoss(rounds=rounds, multiple_of=4),
        exclude=("own", "both"),
    )
    result = gc.compress(model, step, data())
    net: Any = result.model
    half, hidden = net.own.in_features, net.mlp[0].out_features
    assert net.stem.out_features == net.both.in_features == 2 * half
    assert half < 16, "the set itself is cut"
    if isinstance(amount, gc.Latency):
        assert 4.0 <= work(net) <= 0.6 * work(model)
        assert result.report.steps[0].numbers["latency_predicted_ms"] == pytest.approx(work(net))
    elif isinstance(amount, gc.MACs):
        assert traced(net).macs <= 0.6 * traced(model).macs
    elif isinstance(amount, gc.Parameters):
        assert sum(p.numel() for p in net.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())
    else:  # a unit of the set is one in each half
        assert (16 - half) * 2 + 16 - hidden == pytest.approx(0.4 * 48, abs=2)


def test_the_latency_of_a_set_is_timed_with_all_its_groups_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    without_a_clock(monkeypatch)
    model, context = Halves().eval(), Context(data(), Halves(), Halves())
    found, target = traced(model), Clockwork(work)
    groups = [g for g in found.groups if g.name in ("stem", "stem#2", "mlp.0")]
    timer = Timer(model, target, data().calibration[0], tmp_path, context)
    table = measure_latency_table(
        model, found, groups, {g.name: [4, 8] for g in groups}, timer, LatencyCache({"of": "this test"}), context
    )
    assert set(table.saved) == {"stem", "mlp.0"} and table.timed == 4
    assert table.saved["stem"] == pytest.approx({4: 1 / 9, 8: 2 / 9})
    assert [net.stem.out_features for net in target.exported] == [32, 24, 16, 32, 32]


def test_a_group_whose_partner_is_not_selected_stays_whole_and_says_why() -> None:
    class Pair(nn.Module):
        """Two layers whose sizes one number in the forward makes equal."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
            self.other = nn.Linear(16, 3)
            self.last = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            one, two = torch.relu(self.one(x)), torch.relu(self.two(x))
            first, second = torch.cat((one, two), dim=1).chunk(2, dim=1)
            y: Tensor = self.last(self.out(first) + self.other(second))
            return y

    model = Pair().eval()
    free = [g for g in traced(model).groups if g.frozen is None]
    sets = tied_sets(g for g in free if g.units == 16)
    assert [len(members) for members in sets.values()] == [2], free
    step = gc.Prune(to=gc.MACs(0.9), pattern=gc.Channels(), allocation=MeasuredLoss(), exclude=("two", "out", "other"))
    result = gc.compress(model, step, data())
    rows = {row.name: row.reason for row in result.report.steps[0].layers if row.action == "skipped"}
    assert rows["one"] == "it keeps as many units as 'two', which is not cut"
    assert result.model.one.out_features == 16  # type: ignore[union-attr]
