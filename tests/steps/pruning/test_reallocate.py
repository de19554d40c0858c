"""Rounds of the allocation: budgets hold, and the trial returned is the best one seen."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.allocate import MeasuredLoss
from gracile.criteria import OBS
from gracile.graph import trace


class Twin(nn.Module):
    """Two branches added up: cutting one alone is cheap by its table, and what is cut of both adds up badly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = (
            nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 3 * self.first(x) + self.second(x)
        return out


def result(rounds: int, **settings: object) -> gc.Result:
    data = gc.Data(calibration=[torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    allocation = MeasuredLoss(rounds=rounds, examples=384)
    step = gc.Prune(
        pattern=gc.Channels(), criterion=OBS(), allocation=allocation, repair=gc.solvers.LeastSquares(), **settings
    )
    return gc.compress(Twin().eval(), step, data)


@pytest.mark.parametrize("settings", [{"to": gc.MACs(0.6)}, {"to": gc.Parameters(0.6)}, {"fraction": 0.35}], ids=str)
def test_rounds_never_end_further_from_the_original_and_meet_the_amount(settings: dict[str, object]) -> None:
    plain, rounds = (result(count, **settings) for count in (0, 3))
    record = rounds.report.steps[0]
    note = next(note for note in record.notes if "round of the allocation" in note)
    losses = [float(value) for value in re.findall(r"[\d.e-]+\d", note)]
    assert 1 <= len(losses) <= 5 and losses[0] == pytest.approx(plain.report.steps[0].numbers["allocation_loss"], 1e-2)
    assert record.numbers["allocation_loss"] == pytest.approx(min(losses), rel=1e-2)  # three digits are printed
    x = torch.zeros(1, 6)
    small, whole = (trace(m, lambda net: net(x)) for m in (rounds.model, Twin().eval()))
    if "to" in settings:
        assert small.macs <= 0.6 * whole.macs if isinstance(settings["to"], gc.MACs) else True
        counts = [sum(p.numel() for p in m.parameters()) for m in (rounds.model, Twin())]
        assert counts[0] <= 0.6 * counts[1] if isinstance(settings["to"], gc.Parameters) else True
    else:
        assert record.numbers["units_removed"] == pytest.approx(0.35 * 48, abs=1)


def test_a_step_without_measured_widths_has_no_rounds() -> None:
    data = gc.Data(calibration=[torch.randn(64, 6) for _ in range(3)])
    step = gc.Prune(0.4, pattern=gc.Channels(), criterion=OBS(), repair=gc.solvers.LeastSquares())
    record = gc.compress(Twin().eval(), step, data).report.steps[0]
    assert "allocation_loss" not in record.numbers


def test_where_no_widths_within_reach_meet_the_amount_the_best_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency does not add up, so that what the tables around a trial promise may not be measured."""
    from gracile.steps.pruning import reallocate as module

    given = []

    def share_out(tables: object, *rest: object, **settings: object) -> object:
        if any(level.in_context for levels in tables.values() for level in levels):  # type: ignore[attr-defined]
            raise gc.errors.ConfigError("cannot be met")
        given.append(original(tables, *rest, **settings))  # type: ignore[arg-type]
        return given[-1]

    original = module.share_out
    monkeypatch.setattr(module, "share_out", share_out)
    found = result(3, to=gc.MACs(0.6))
    kept = {row.name: row.kept for row in found.report.steps[0].layers if row.action == "cut"}
    assert kept in [{name: len(units) for name, units in keep.items()} for keep in given]


def test_after_the_widths_shared_out_one_group_is_moved_to_what_promises_least() -> None:
    """Two groups of ten units, one of which is moved by hand-made tables whose losses are known."""
    from types import SimpleNamespace
    from typing import cast

    from gracile.allocate import Level
    from gracile.graph import Group
    from gracile.steps.pruning.reallocate import _untried
    from gracile.steps.pruning.sequence import Trial

    sets = {n: [cast(Group, SimpleNamespace(name=n, units=10))] for n in "ab"}
    near = {"a": [Level(2, 1.0, 2.0), Level(4, 5.0, 4.0)], "b": [Level(2, 1.0, 2.0), Level(4, 2.0, 4.0)]}
    best = cast(Trial, SimpleNamespace(keep={"a": list(range(8)), "b": list(range(6))}))  # 2 and 4 of ten removed

    def share(tables: Mapping[str, list[Level]]) -> dict[str, list[int]]:
        """The least loss that removes six units or more, by trying all."""
        pairs = [(p.loss + q.loss, p.removed, q.removed) for p in tables["a"] for q in tables["b"]]
        able = [pair for pair in pairs if pair[1] + pair[2] >= 6]
        if not able:
            raise gc.errors.ConfigError("cannot be met")
        _, a, b = min(able)
        return {"a": list(range(10 - a)), "b": list(range(10 - b))}

    def removed(keep: dict[str, list[int]] | None) -> tuple[int, int] | None:
        return None if keep is None else (10 - len(keep["a"]), 10 - len(keep["b"]))

    tried: list[dict[str, int]] = []
    assert removed(_untried(near, best, sets, share, tried)) == (2, 4)  # 1 + 2, the least
    tried.append({"a": 8, "b": 6})
    assert removed(_untried(near, best, sets, share, tried)) == (4, 2)  # 5 + 1, where (4, 4) has 5 + 2
    tried.append({"a": 6, "b": 8})
    assert _untried(near, best, sets, share, tried) is None  # (4, 4) is within reach of no one move
