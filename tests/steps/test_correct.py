from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gracile.context import Context, Progress
from gracile.data import Data
from gracile.recipe import Recorder
from gracile.steps import Prune
from gracile.steps.correct import copy_model, correct_statistics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def context(model: nn.Module, told: list[Progress] | None = None) -> Context:
    batches = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return Context(Data(calibration=batches), model, model, on_progress=told.append if told is not None else None)


def test_what_helped_is_recorded_by_layer_and_in_a_note() -> None:
    reference, model, told = net(), net(), list[Progress]()
    with torch.no_grad():
        model[3].bias += 1
    recorder = Recorder(Prune(0.5))
    correct_statistics(model, reference, context(reference, told), recorder, {})
    rows = {(row.name, row.kind, row.action) for row in recorder.layers}
    assert rows == {("0", "Linear", "corrected"), ("1", "BatchNorm1d", "corrected"), ("3", "Linear", "corrected")}
    assert recorder.numbers["output_error"] < 1e-10 < recorder.numbers["output_error_before_correction"]
    assert "lowered the output error" in recorder.notes[0]
    assert [p.done for p in told] == [1, 2, 3]


def test_what_did_not_help_is_said_to_be_taken_back() -> None:
    reference, model = net(), net()
    with torch.no_grad():
        model[3].weight[0] = -model[3].weight[0]
    ctx = context(reference)
    first = Recorder(Prune(0.5))
    correct_statistics(model, reference, ctx, first, {})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again = Recorder(Prune(0.5))
    correct_statistics(model, reference, ctx, again, {})  # all that means can do is done
    assert again.numbers["output_error"] == pytest.approx(first.numbers["output_error"], rel=1e-4)
    if again.notes and "taken back" in again.notes[0]:
        assert not again.layers
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_untouched_model_is_not_spoken_of() -> None:
    recorder = Recorder(Prune(0.5))
    correct_statistics(net(), net(), context(net()), recorder, {})
    assert not recorder.notes and not recorder.layers and recorder.numbers["output_error"] == 0


def test_a_copy_shares_nothing() -> None:
    model = net()
    twin = copy_model(model)
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in twin.parameters())
    assert copy.deepcopy(twin)(torch.ones(2, 4)).shape == (2, 3)
