"""Plans: forms of a target, steps for a share of units, the losses that fit outputs, limits that are broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.graph import trace
from gracile.planner import (
    WIDTH_MULTIPLE,
    Form,
    broken_limits,
    forms,
    goal_data,
    losses_for,
    mixed_precision_pays,
    prune_steps,
    quantize_step,
    quantize_steps,
    recipe_for,
)
from gracile.report.model import Measurement


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1))
        return y


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, outputs))


def traced(model: nn.Module, *shape: int) -> Any:
    return trace(model, lambda net: net(torch.randn(shape)))


def labelled(labels: Tensor) -> gc.Data:
    batch = (torch.randn(len(labels), 6), labels)
    return gc.Data(train=[batch], calibration=[batch[0]], loss=gc.losses.cross_entropy)


@pytest.mark.parametrize(("dot_product", "scheme"), [(True, "W8A8"), (False, "W7A8")])
def test_the_targets_own_modes_come_first_and_integers_are_tried_in_each(
    monkeypatch: pytest.MonkeyPatch, dot_product: bool, scheme: str
) -> None:
    monkeypatch.setattr("gracile.planner.has_int8_dot_product", lambda: dot_product)
    found = [form.label for form in forms(gc.Goal(target=gc.OpenVINO()))]
    modes = gc.OpenVINO().capabilities.precisions
    assert found[0] == gc.OpenVINO().precision == "f32"
    assert set(found) == set(modes) | {f"{scheme} {mode}" for mode in modes}
    assert [form.scheme is None for form in forms(gc.Goal(target=gc.OpenVINO()))] == [True] * len(modes) + [
        False
    ] * len(modes)
    asked = forms(gc.Goal(target=gc.OpenVINO(precision="default")))
    assert asked[0].label == "default" and len(asked) == len(found)


def test_steps_cut_what_the_model_has_by_what_the_data_allow() -> None:
    data = labelled(torch.tensor([0, 1, 2]))
    (step,) = prune_steps(0.3, traced(mlp(), 2, 6), data)
    assert step == gc.Prune(
        0.3, criterion=gc.Taylor(), pattern=gc.Channels(multiple_of=WIDTH_MULTIPLE), repair=gc.solvers.LeastSquares()
    )
    (step,) = prune_steps(0.3, traced(mlp(), 2, 6), gc.Data(calibration=[torch.randn(2, 6)]))
    assert step.criterion == gc.Magnitude()
    steps = prune_steps(0.3, traced(Attention(), 2, 5, 16), gc.Data(evaluation=[torch.randn(2, 5, 16)]))
    assert [type(s.pattern) for s in steps] == [gc.Heads]
    assert steps[0].repair is None  # nothing to fit on


def test_models_with_layer_norms_are_smoothed_and_others_are_not() -> None:
    assert quantize_step(gc.W8A8, traced(mlp(), 2, 6)) == gc.Quantize(gc.W8A8)
    step = quantize_step(gc.W8A8, traced(Attention(), 2, 5, 16))
    assert step == gc.Quantize(gc.W8A8, ranges=gc.ranges.MinMax(), equalize=gc.equalize.SmoothQuant())
    assert quantize_step(gc.W8A16, traced(Attention(), 2, 5, 16)) == gc.Quantize(gc.W8A16)


def test_a_recipe_prunes_distils_and_quantizes_in_this_order() -> None:
    model, data = mlp(), labelled(torch.tensor([0, 1, 2]))
    goal = gc.Goal(target=gc.OnnxRuntime(), epochs=2)
    plain, *_, integers = forms(goal)
    graph = traced(model, 2, 6)
    assert recipe_for(0.0, plain, graph, model, data, goal, False) is None
    whole = recipe_for(0.25, integers, graph, model, data, goal, True)
    assert whole is not None
    assert [type(step) for step in whole.steps] == [gc.Prune, gc.Distill, gc.Quantize]
    assert whole.steps[1].epochs == 2 and whole.steps[1].mixed_precision
    without = recipe_for(0.25, integers, graph, model, data, replace(goal, epochs=0), False)
    assert without is not None and [type(step) for step in without.steps] == [gc.Prune, gc.Quantize]


def test_lstms_are_of_integers_where_the_target_has_such() -> None:
    class Net(nn.Module):
        def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
            super().__init__()
            self.rnn, self.head = kind(5, 16, batch_first=True), nn.Linear(16, 3)  # type: ignore[call-arg]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0].mean(1))
            return y

    x, model = torch.randn(4, 7, 5), Net().eval()
    data, graph = gc.Data(calibration=[x]), traced(model, 2, 7, 5)
    found = quantize_steps(Form(gc.OnnxRuntime(), gc.W8A8), graph, model)
    dynamic = gc.Quantize(gc.formats.W8A8Dynamic, correct=False)
    assert found == [gc.only(["rnn"], dynamic), gc.Quantize(gc.W8A8, exclude=("rnn",))]
    small = gc.compress(model, gc.Recipe(*found), data)
    assert small.model.rnn.dynamic and small.model.head.input_format == gc.W8A8.input
    rows = [row.name for step in small.report.steps for row in step.layers if row.action == "skipped"]
    assert rows == []
    assert quantize_steps(Form(gc.OpenVINO(), gc.W8A8), graph, model) == [gc.Quantize(gc.W8A8)]
    assert quantize_steps(Form(gc.OnnxRuntime(), gc.W8A8), graph, Net(nn.GRU)) == [gc.Quantize(gc.W8A8)]
    timed = quantize_steps(Form(gc.OnnxRuntime(), gc.formats.W7A8), graph, model, for_timing=True)
    assert timed[0] == gc.only(["rnn"], gc.Quantize(gc.formats.W7A8Dynamic, correct=False))
    alone = nn.Sequential(nn.LSTM(5, 16))
    assert len(quantize_steps(Form(gc.OnnxRuntime(), gc.W8A8), graph, alone)) == 1


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (3, torch.tensor([0, 1, 2]), gc.SoftLabels(temperature=3.0)),
        (3, torch.randn(3, 3), gc.losses.MeanSquaredError()),
        (1, torch.tensor([0, 1, 1]), gc.losses.MeanSquaredError()),
    ],
    ids=["classes", "floating-point labels", "one output"],
)
def test_soft_labels_are_for_classes_and_squared_errors_for_the_rest(
    outputs: int, labels: Tensor, expected: object
) -> None:
    assert losses_for(mlp(outputs), labelled(labels)) == (expected,)


def test_which_precision_trains_faster_is_found_without_touching_the_model() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert mixed_precision_pays(model, labelled(torch.tensor([0, 1, 2]))) in (True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_broken_limits_name_what_was_measured_and_what_was_allowed() -> None:
    before = Measurement(label="a", target="t", latency_p50_ms=10.0, macs=1000, parameters=100, file_bytes=4000)
    after = replace(before, latency_p50_ms=6.0, macs=400, parameters=80, file_bytes=900)
    limits = (gc.Latency(0.5), gc.MACs(0.5), gc.Parameters(70), gc.Bytes(0.25))
    goal = gc.Goal(target=gc.OnnxRuntime(), limits=limits)
    assert broken_limits(goal, before, after) == ["6 ms, limit 5", "80 parameters, limit 70"]
    assert goal_data(goal, before)["latency_ms"] == 5.0
    assert goal_data(gc.Goal(target=gc.OnnxRuntime()), before)["latency_ms"] is None
