"""Iterative and Gradual: what each round removes, how training is divided, and that a run goes on after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.graph import trace
from gracile.recipe import Only, Step
from gracile.steps import AdamW

TRAIN = gc.Distill(epochs=8, optimizer=AdamW(2e-3), held_out=0.25)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


def data() -> gc.Data:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 12, generator=generator) for _ in range(8)]
    return gc.Data(calibration=batches[:4], train=batches)


def cuts(step: Step) -> list[gc.Prune]:
    return [leaf for leaf in step.leaves() if isinstance(leaf, gc.Prune)]


def sparsity(model: nn.Module) -> float:
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_rounds_remove_the_same_share_of_the_weights_left() -> None:
    step = gc.Iterative(gc.Prune(0.875), gc.Finetune(), rounds=3)
    assert [cut.fraction for cut in cuts(step)] == pytest.approx([0.5, 0.75, 0.875])
    assert [type(leaf).__name__ for leaf in step.leaves()] == ["Prune", "Finetune"] * 3


def test_gradual_cuts_follow_the_cubic_of_zhu_and_gupta() -> None:
    step = gc.Gradual(gc.Prune(0.8), TRAIN, rounds=4)
    # s_t = s_f + (s_i − s_f) (1 − t/n)³ with s_i = 0, by hand: 0.8 · (1 − 27/64), (1 − 8/64), (1 − 1/64), 1
    assert [cut.fraction for cut in cuts(step)] == pytest.approx([0.4625, 0.7, 0.7875, 0.8])


def test_fractions_of_units_are_of_the_units_left_and_multiply_to_the_whole() -> None:
    for step in (
        gc.Iterative(gc.Prune(0.6, pattern=gc.Channels()), TRAIN, rounds=3),
        gc.Gradual(gc.Prune(0.6, pattern=gc.Channels()), TRAIN, rounds=4),
    ):
        kept = [1 - float(cut.fraction or 0) for cut in cuts(step)]
        assert math.prod(kept) == pytest.approx(0.4)
    assert kept == sorted(kept)  # gradual: the first cuts most


def test_thresholds_rise_evenly() -> None:
    step = gc.Iterative(gc.Prune(below=0.3), TRAIN, rounds=3)
    assert [cut.below for cut in cuts(step)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("budget", [gc.MACs(0.25), gc.MACs(1200), gc.Parameters(0.3)], ids=str)
@pytest.mark.parametrize("gradual", [False, True])
def test_budgets_are_met_round_by_round(budget: Any, gradual: bool) -> None:
    """The costs after the rounds lie on the way there by ratio: x₀ (x/x₀)^share."""
    model = net()
    prune = gc.Prune(to=budget, pattern=gc.Channels())
    step = gc.Gradual(prune, TRAIN, rounds=3) if gradual else gc.Iterative(prune, gc.Distill(), rounds=3)
    shares = [1 - (1 - k / 3) ** 3 if gradual else k / 3 for k in (1, 2, 3)]

    def cost(net: nn.Module) -> float:
        if isinstance(budget, gc.Parameters):
            return float(sum(p.numel() for p in net.parameters()))
        return float(trace(net, lambda net: net(torch.ones(1, 12))).macs)

    whole = cost(model)
    goal = budget.amount * whole if budget.amount < 1 else budget.amount
    reached = []
    context = Context(data(), net(), net())
    for leaf in step.leaves():
        leaf(model, context)
        if isinstance(leaf, gc.Prune):
            reached.append(cost(model))
    for now, share in zip(reached, shares):
        limit = whole * (goal / whole) ** share
        assert 0.9 * limit <= now <= limit * (1 + 1e-9)  # a unit of the widest layer is 4 % of the work


def test_training_is_divided_into_one_schedule() -> None:
    step = gc.Gradual(gc.Prune(0.8), TRAIN, rounds=4, until=0.5)
    parts = [leaf for leaf in step.leaves() if isinstance(leaf, gc.Distill)]
    assert [part.epochs for part in parts] == [1, 1, 1, 5]
    assert [part.span for part in parts] == [(0, 1 / 8), (1 / 8, 2 / 8), (2 / 8, 3 / 8), (3 / 8, 1)]


@pytest.mark.parametrize("schedule", [gc.Iterative(gc.Prune(0.9), TRAIN), gc.Gradual(gc.Prune(0.9), TRAIN)])
def test_weights_reach_the_sparsity_and_answer_better_than_cut_at_once(schedule: Step) -> None:
    examples, original = torch.cat(list(data().train or [])), net()

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(examples) - original(examples)).square().mean())

    at_once = gc.compress(net(), gc.Recipe(gc.Prune(0.9), gc.Distill(epochs=1, optimizer=AdamW(2e-3))), data()).model
    result = gc.compress(net(), schedule, data())
    assert sparsity(result.model) == pytest.approx(0.9, abs=1e-3)
    assert error(result.model) < error(at_once)
    assert len(result.report.steps) == len(schedule.leaves())


def test_heads_blocks_and_several_patterns_go_in_rounds() -> None:
    model = nets.MLP().eval()
    batches = [torch.randn(8, *nets.MLP.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    prune = gc.Prune(0.5, pattern=(gc.Channels(), gc.Heads()), repair=gc.solvers.LeastSquares())
    step = gc.Iterative(prune, gc.Distill(), rounds=2)
    result = gc.compress(model, step, gc.Data(calibration=batches, train=batches))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    assert after < 0.6 * before


def test_only_reaches_the_cuts() -> None:
    step = gc.Gradual(gc.only("2", gc.Prune(0.5)), TRAIN, rounds=2)
    assert [type(leaf) for leaf in step.leaves()] == [Only, gc.Distill, Only, gc.Distill]
    model = gc.compress(net(), step, data()).model
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert [int((w == 0).sum()) for w in weights] == [0, 64 * 64 // 2, 0]


def test_called_by_itself_it_does_all_rounds() -> None:
    model = net()
    record = gc.Iterative(gc.Prune(0.75), gc.Distill(), rounds=2)(model, Context(data(), net(), net()))
    assert sparsity(model) == pytest.approx(0.75, abs=1e-3)
    assert record.numbers["sparsity"] == pytest.approx(0.75, abs=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("schedule", [gc.Iterative(gc.Prune(0.9), TRAIN, rounds=2), gc.Gradual(gc.Prune(0.9), TRAIN)])
def test_a_killed_run_goes_on_and_ends_the_same(schedule: Step, tmp_path: Path) -> None:
    whole = gc.compress(net(), schedule, data()).model
    told = 0

    def kill(progress: gc.Progress) -> None:
        nonlocal told
        told += progress.phase == "train"
        if told == 40:
            raise Killed

    with pytest.raises(Killed):
        gc.compress(net(), schedule, data(), run_dir=tmp_path / "run", on_progress=kill)
    seen: list[str] = []
    resumed = gc.compress(
        net(), schedule, data(), run_dir=tmp_path / "run", on_progress=lambda p: seen.append(p.phase)
    ).model
    assert 0 < seen.count("train") < told + 40
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)


def test_all_trainings_of_a_run_hold_out_the_same_examples() -> None:
    seen: list[set[float]] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        if seen and not outputs.requires_grad:
            seen[-1].update(batch[:, 0].tolist())
        return outputs.square().mean()

    class Told(gc.Finetune):
        def __call__(self, model: nn.Module, context: Context) -> Any:
            seen.append(set())
            return super().__call__(model, context)

    given = data()
    labelled = gc.Data(calibration=given.calibration, train=given.train, loss=loss)
    gc.compress(net(), gc.Iterative(gc.Prune(0.5), Told(held_out=0.25), rounds=3), labelled)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and len(seen[0]) == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gc.Iterative(gc.Quantize(gc.W8A8), TRAIN), "the cut"),
        (lambda: gc.Iterative(gc.Prune(0.5), 3), "the step that trains"),
        (lambda: gc.Iterative(gc.Prune(0.5), TRAIN, rounds=0), "whole number"),
        (lambda: gc.Iterative(gc.Prune(pattern=gc.NM(2, 4)), TRAIN), "its amount is its name"),
        (lambda: gc.Gradual(gc.Prune(0.5), gc.Prune(0.5)), "Distill"),
        (lambda: gc.Gradual(gc.Prune(0.5), TRAIN, rounds=6), "at least 12 epochs"),
        (lambda: gc.Gradual(gc.Prune(0.5), TRAIN, until=0.0), "until"),
        (lambda: gc.Gradual(gc.Prune(0.5), gc.Distill(epochs=8, span=(0.0, 0.5))), "span"),
        (lambda: gc.Distill(span=(0.5, 0.5)), "span"),
        (lambda: gc.MACs(0.5, way=0.0), "way"),
    ],
)
def test_impossible_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(gc.ConfigError, match=message):
        make()
