"""Loss tables: a level is what cutting those units alone, with their readers refitted, does to the outputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.allocate import MeasuredLoss
from gracile.context import Context
from gracile.criteria import OBS
from gracile.data import Data
from gracile.errors import ConfigError
from gracile.graph import cut_macs, trace
from gracile.solvers import LeastSquares
from gracile.stats.match import divergence
from gracile.steps.pruning.consumers import collect_consumers
from gracile.steps.pruning.sequence import choose_in_sequence
from gracile.steps.pruning.tables import measure_around, measure_tables, outputs_of
from gracile.steps.pruning.units import ScoredGroups


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False))
    model = nn.Sequential(*layers, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).eval()
    nn.init.uniform_(model[1].running_var, 0.3, 2.0)
    nn.init.normal_(model[4].running_mean)
    return model


def data() -> Data:
    generator = torch.Generator().manual_seed(3)
    return Data(calibration=[torch.randn(64, 2, 4, 4, generator=generator) for _ in range(4)])


def test_a_level_is_the_loss_of_that_cut_with_its_readers_refitted() -> None:
    model, examples = net(), data()
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, lambda m: m(examples.calibration[0]))
    groups = [g for g in traced.groups if g.frozen is None]
    context = Context(examples, model, model)
    consumers = collect_consumers(model, traced, groups, context)
    scores = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(1)) for g in groups}
    scored = ScoredGroups(model, traced, examples.calibration[0], groups, scores, consumers)
    tables = measure_tables(scored, MeasuredLoss(levels=4), context)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(tables) == {g.name for g in groups}
    first = next(g for g in groups if g.units == 8)
    level = tables[first.name][1]
    assert level.removed == 4
    kept = scores[first.name].argsort()[4:].sort().values
    assert level.saved == traced.macs - cut_macs(traced, {first.name: kept.tolist()})
    # By another way: the second convolution regressed with an intercept on the channels kept, ridge left out.
    with torch.no_grad():
        x = torch.cat(list(examples.calibration))
        hidden = model[2](model[1](model[0](x)))
        patches = nn.functional.unfold(hidden[:, kept], 3).transpose(1, 2).reshape(-1, 9 * 4).double()
        target = model[3](hidden).flatten(2).transpose(1, 2).reshape(-1, 6).double()
        ones = torch.ones(len(patches), 1, dtype=torch.float64)
        fitted = torch.linalg.lstsq(torch.cat([patches, ones], 1), target).solution
        y = (torch.cat([patches, ones], 1) @ fitted).reshape(len(x), 4, 6).transpose(1, 2).reshape(len(x), 6, 2, 2)
        brute = divergence([model[4:](y.float())], [model(x)])
    assert level.loss == pytest.approx(brute, rel=0.1)  # the ridge is a hundredth of the inputs' variance
    losses = [found.loss for found in tables[first.name]]
    assert losses == sorted(losses) and losses[0] > 0


def test_outputs_that_are_not_finite_are_named_and_no_table_is_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from gracile.steps.pruning import tables as module

    assert math.isnan(divergence([torch.full((2, 3), float("nan"))], [torch.zeros(2, 3)]))
    monkeypatch.setattr(module, "divergence", lambda outputs, references: float("nan"))
    step = gc.Prune(to=gc.MACs(0.6), pattern=gc.Channels(), allocation=MeasuredLoss(levels=4))
    with pytest.raises(gc.DataError, match="units of '0' removed"):
        gc.compress(net(), step, data())


def test_a_batch_norm_without_statistics_takes_up_the_shift_itself() -> None:
    model = net()
    model[4] = nn.BatchNorm2d(6, track_running_stats=False).eval()
    step = gc.Prune(to=gc.MACs(0.6), pattern=gc.Channels(), allocation=MeasuredLoss(levels=4))
    assert gc.compress(model, step, data()).model[0].out_channels < 8


def test_divergence_is_the_kl_of_classes_and_a_relative_error_of_others() -> None:
    y0, y = torch.randn(7, 4), torch.randn(7, 4)
    kl = nn.functional.kl_div(y.log_softmax(1), y0.log_softmax(1), log_target=True, reduction="batchmean")
    assert divergence(list(y.split(3)), list(y0.split(3))) == pytest.approx(float(kl), rel=1e-6)
    assert divergence([y0], [y0]) == 0
    nearly = [torch.randn(50, 4, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    assert all(divergence([y + 1e-7], [y]) >= 0 for y in nearly)  # its root is taken: rounding must not go below 0
    a, b = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert divergence([a], [b]) == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-6)


@pytest.mark.parametrize("criterion", [gc.criteria.OBS(), gc.Magnitude()], ids=str)
def test_prune_shares_out_by_measured_loss_to_a_budget_and_to_a_share(criterion: object) -> None:
    allocation = MeasuredLoss(levels=4)
    step = gc.Prune(to=gc.MACs(0.6), criterion=criterion, pattern=gc.Channels(), allocation=allocation)
    result = gc.compress(net(), step, data())
    macs = trace(result.model, lambda m: m(data().calibration[0])).macs
    full = trace(net(), lambda m: m(data().calibration[0])).macs
    assert 0.45 * full < macs <= 0.6 * full
    share = gc.Prune(0.5, criterion=criterion, pattern=gc.Channels(), allocation=allocation)
    rows = [r for r in gc.compress(net(), share, data()).report.steps[0].layers if r.action == "cut"]
    assert sum((row.of or 0) - (row.kept or 0) for row in rows) == 7  # half of 8 + 6


def test_obs_keeps_more_of_the_output_than_magnitude() -> None:
    """Two channels copy two others and have large weights; four of small weights say what nothing else says."""

    def copies() -> nn.Sequential:
        model = net()
        with torch.no_grad():
            model[0].weight[4:6] = model[0].weight[6:]
            model[0].weight[4:] *= 10
            model[0].weight[:4] *= 0.1
            model[1].running_mean.zero_()
            model[1].running_var[:4], model[1].running_var[4:] = 0.01, 30.0
        return model

    errors = {}
    for criterion in (gc.criteria.OBS(), gc.Magnitude()):
        step = gc.Prune(
            0.5, criterion=criterion, pattern=gc.Channels(), exclude=("3",), repair=gc.solvers.LeastSquares()
        )
        result = gc.compress(copies(), step, data())
        with torch.no_grad():
            x = data().calibration[0]
            errors[type(criterion).__name__] = divergence([result.model(x)], [copies()(x)])
    assert errors["OBS"] < 0.5 * errors["Magnitude"]


def test_single_weights_and_thresholds_have_no_widths_to_share_out() -> None:
    with pytest.raises(ConfigError, match="widths"):
        gc.Prune(0.5, allocation=MeasuredLoss())
    with pytest.raises(ConfigError, match="widths"):
        gc.Prune(below=0.1, pattern=gc.Channels(), allocation=MeasuredLoss())


def test_obs_on_single_weights_skips_what_does_not_unfold() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()
    tokens = [torch.randint(0, 10, (8, 5)) for _ in range(3)]
    result = gc.compress(model, gc.Prune(0.5, criterion=gc.criteria.OBS()), gc.Data(calibration=tokens))
    assert float((result.model[1].weight == 0).float().mean()) == 0.5
    skipped = [row for row in result.report.steps[0].layers if row.action == "skipped"]
    assert [row.name for row in skipped] == ["0"] and "unfold" in skipped[0].reason


def test_around_a_trial_only_the_readers_of_one_group_change() -> None:
    model, examples = net(), data()
    traced = trace(model, lambda m: m(examples.calibration[0]))
    groups = [g for g in traced.groups if g.frozen is None and g.units > 1]
    inner, last = sorted(groups, key=lambda g: -g.units)
    context, solver = Context(examples, model, model), LeastSquares(1e-9)
    keep = {inner.name: [0, 1, 2, 3, 4], last.name: [0, 1, 2, 3]}
    trial = choose_in_sequence(model, traced, groups, keep, OBS(), solver, context)
    before = copy.deepcopy(trial.model.state_dict())
    batches = list(examples.calibration)
    references = outputs_of(model, examples, batches)
    allocation = MeasuredLoss(levels=8, reach=0.16)
    tables = measure_around(trial, traced, groups, allocation, 1.0, references, batches, context)
    # Solved again from the same moments: the same numbers but for the order of sums in float64.
    for name, value in trial.model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-5)
    present = divergence(outputs_of(trial.model, examples, batches), references)
    for group in groups:
        levels = {level.removed: level for level in tables[group.name]}
        now = levels[group.units - len(keep[group.name])]
        assert all(level.in_context for level in levels.values()) and now.loss == pytest.approx(present, rel=1e-4)
        whole = {**trial.keep, group.name: list(range(group.units))}
        assert now.saved == cut_macs(traced, whole) - cut_macs(traced, trial.keep)
    # By another way: the classifier regressed with an intercept on three of the six channels that the trial computes,
    # from the batches that the trial was fitted on (the first in eight is held out).
    best = trial.scores[last.name].argsort(descending=True)[:3].sort().values
    with torch.no_grad():
        columns = (best[:, None] * 4 + torch.arange(4)).flatten()

        def hidden(batch: torch.Tensor) -> torch.Tensor:
            x = trial.model[:7](batch)[:, columns].double()
            return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)

        fitted = torch.linalg.lstsq(hidden(torch.cat(batches[1:])), model(torch.cat(batches[1:])).double()).solution
        expected = divergence([hidden(batch) @ fitted for batch in batches], references)
    level = next(level for level in tables[last.name] if level.removed == 3)
    assert level.loss == pytest.approx(expected, rel=1e-2)  # the small ridge, and float32 weights
