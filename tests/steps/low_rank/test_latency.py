"""Ranks to a budget of latency, on a runtime whose times are computed: what is chosen can be checked exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import Tensor, nn

import gracile as gc
from gracile.errors import ConfigError, NothingChangedError
from gracile.evaluate.latency import Relative, measure_relative
from gracile.nn import Factorized
from gracile.steps.latency import timing


class Stack(nn.Module):
    """Four equal layers, whose largest useful rank is 31, and one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.wide = nn.Linear(64, 80)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = x + torch.tanh(layer(x))
        y: Tensor = self.wide(x)
        return y


def rank(layer: Any) -> int | None:
    return layer.first.out_features if isinstance(layer, Factorized) else None


def staircase(model: Any) -> float:
    """1 ms, 4 ms for each whole layer, 1 ms for every begun vector of 8 ranks of one that is not; the wide one is
    slower by 1 ms at any rank."""
    cost = 1.0 + sum(4.0 if rank(layer) is None else float(-(-rank(layer) // 8)) for layer in model.body)  # type: ignore[operator]
    return cost + (4.0 if rank(model.wide) is None else 5.0)


def data() -> gc.Data:
    return gc.Data(calibration=[torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)])


def step(budget: gc.Latency, **settings: Any) -> gc.Factorize:
    return gc.Factorize(to=budget, **{"multiple_of": 8, "power": 1.0, **settings})


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)


def test_ranks_fill_vectors_within_the_budget_and_all_figures_are_recorded() -> None:
    result = gc.compress(Stack().eval(), step(gc.Latency(0.7, target=Clockwork(staircase))), data())
    record = result.report.steps[0]
    assert staircase(Stack()) == 21.0
    assert staircase(result.model) == 14.0  # 14.7 are allowed, in whole milliseconds
    assert all(r is None or r % 8 == 0 for r in map(rank, result.model.body))
    assert record.numbers["latency_before_ms"] == 21.0
    assert record.numbers["latency_ms"] == pytest.approx(14.0)
    assert record.numbers["latency_predicted_ms"] == pytest.approx(14.0)
    assert any("21 ms before, 14 ms after, 14.7 ms allowed, 14 ms predicted" in note for note in record.notes)


def test_layers_and_ranks_that_are_not_faster_are_left_out_and_said() -> None:
    result = gc.compress(Stack().eval(), step(gc.Latency(0.7, target=Clockwork(staircase))), data())
    record = result.report.steps[0]
    skipped = {row.name: row.reason for row in record.layers if row.action == "skipped"}
    assert skipped == {"wide": "no rank is faster on clockwork: the best saves -4.76% of the latency"}
    assert rank(result.model.wide) is None
    # Any rank: at 25 to 31 four vectors are begun, and those take as long as the whole layer.
    result = gc.compress(Stack().eval(), step(gc.Latency(0.7, target=Clockwork(staircase)), multiple_of=1), data())
    note = "body.0, body.1, body.2, body.3: not faster on clockwork at rank 28, 31, and so not tried there."
    assert note in result.report.steps[0].notes
    assert all(r is None or r <= 24 for r in map(rank, result.model.body))


def test_equal_layers_are_timed_once_and_a_second_run_times_no_rank() -> None:
    first, second = Clockwork(staircase), Clockwork(staircase)
    once = gc.compress(Stack().eval(), step(gc.Latency(0.7, target=first)), data())
    timed = [[rank(layer) for layer in (*model.body, model.wide)] for model in first.exported[1:]]
    assert timed[:3] == [[r, r, r, r, None] for r in (24, 16, 8)]
    assert timed[3:7] == [[None, None, None, None, r] for r in (32, 24, 16, 8)]
    again = gc.compress(Stack().eval(), step(gc.Latency(0.7, target=second)), data())
    assert len(second.exported) == len(first.exported) - 7
    assert any("no rank had to be timed" in note for note in again.report.steps[0].notes)
    assert once.edits == again.edits


@pytest.mark.parametrize("more", [-0.3, 0.3])
def test_where_layers_do_not_add_up_measuring_corrects_the_amount(more: float) -> None:
    def together(model: Any) -> float:
        saved = 21.0 - staircase(model)
        return 21.0 - saved * (1 + more * (saved - 3) / 9)

    result = gc.compress(Stack().eval(), step(gc.Latency(0.75, target=Clockwork(together))), data())
    measured, predicted = (result.report.steps[0].numbers[f"latency_{name}ms"] for name in ("", "predicted_"))
    assert measured == pytest.approx(together(result.model))
    assert 0.75 * 21 - 2.2 < measured <= 0.75 * 21  # a vector of one layer is up to 1.6 ms
    assert abs(predicted - measured) > 0.05


def test_what_cannot_be_met_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cannot be met; the nearest that was reached is 9 ms of 21 ms \(0.429\)"):
        gc.compress(Stack().eval(), step(gc.Latency(0.3, target=Clockwork(staircase))), data())
    with pytest.raises(ConfigError, match="within this budget already"):
        gc.compress(Stack().eval(), step(gc.Latency(30.0, target=Clockwork(staircase), ms=True)), data())
    with pytest.raises(ConfigError, match=r"Factorize\(to=.*: no target to measure on"):
        gc.compress(Stack().eval(), step(gc.Latency(0.7)), data())


def test_where_nothing_is_faster_nothing_is_factorized() -> None:
    def slower(model: Any) -> float:
        return 10.0 + sum(isinstance(layer, Factorized) for layer in (*model.body, model.wide))

    with pytest.raises(NothingChangedError, match="no layer is faster factorized"):
        gc.compress(Stack().eval(), step(gc.Latency(0.7, target=Clockwork(slower))), data())


def test_what_is_within_the_error_of_timing_is_not_faster_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(reference: Any, candidate: Any, **_: Any) -> Relative:
        return Relative(candidate() / reference(), 0.3, reference(), 5)

    monkeypatch.setattr(timing, "measure_relative", noisy)
    targets = Clockwork(staircase), Clockwork(staircase)
    for target in targets:  # all four at rank 16 save 8 of 21 ms, less than twice the error
        with pytest.raises(NothingChangedError, match="no layer is faster factorized"):
            gc.compress(Stack().eval(), step(gc.Latency(0.7, target=target)), data())
    assert len(targets[0].exported) == len(targets[1].exported)


@pytest.mark.slow
def test_on_a_runtime_the_model_is_faster_by_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(timing, "measure_relative", measure_relative)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    batches = [torch.randn(128, 512, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    budget = gc.Latency(0.7, target=gc.OnnxRuntime(threads=1))
    result = gc.compress(net, gc.Factorize(to=budget, levels=3), gc.Data(calibration=batches))
    numbers = result.report.steps[0].numbers
    assert numbers["latency_ms"] <= 0.75 * numbers["latency_before_ms"]  # measured again, on a machine that may be busy
