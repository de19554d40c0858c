"""Formats within a budget of latency, on a runtime whose times are computed: what is chosen can be checked exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from torch import Tensor, nn

import gracile as gc
from gracile.errors import ConfigError, NothingChangedError
from gracile.graph import trace
from gracile.nn import QuantizedLayer
from gracile.stats.match import relative_error
from gracile.steps.quantization import mixed_precision as module
from gracile.steps.quantization.quantize_layers import layers_with_output_grids
from tests.steps.quantization.test_mixed_precision import data, net

OPTIONS = (None, gc.W8A8)
LAYERS = ("stem", "much", "little", "head")
W3A8 = gc.Scheme("W3A8", gc.Int(3), gc.W8A8.input)


def in_integers(model: Any) -> dict[str, bool]:
    return {name: isinstance(model.get_submodule(name), QuantizedLayer) for name in LAYERS}


def cost(model: Any) -> float:
    """Four milliseconds for a layer in floating point, one for another, and one to go from the first to others."""
    found = in_integers(model)
    between = [("stem", "much"), ("stem", "little"), ("much", "head"), ("little", "head")]
    return sum(1.0 if each else 4.0 for each in found.values()) + sum(found[a] != found[b] for a, b in between)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)


def quantized(budget: gc.Latency, options: tuple[Any, ...] = OPTIONS, **settings: Any) -> gc.Result:
    return gc.compress(net(), gc.Quantize(to=budget, options=options, **settings), data())


def error(model: nn.Module) -> float:
    batches = list(data().calibration_batches)
    with torch.no_grad():
        found, expected = ([m(b) for b in batches] for m in (model, net()))
    return relative_error(*([y - y.mean(1, keepdim=True) for y in ys] for ys in (found, expected)))


@pytest.mark.parametrize("amount", [0.95, 0.8, 0.6, 0.35, 0.25])
def test_what_is_chosen_is_within_the_budget_and_near_the_best_that_is(amount: float) -> None:
    result = quantized(gc.Latency(amount, target=Clockwork(cost)), (None, W3A8), correct=False)
    numbers = result.report.steps[0].numbers
    assert cost(net()) == 16.0
    assert result.report.steps[0].title == f"Quantize to W3A8 or floating point within Latency({amount:g}) on clockwork"
    assert numbers["latency_before_ms"] == 16.0
    assert numbers["latency_ms"] == pytest.approx(cost(result.model)) and cost(result.model) <= amount * 16
    left = {row.name for row in result.report.steps[0].layers if row.action == "skipped"}
    assert left == {name for name, found in in_integers(result.model).items() if not found}
    errors = []
    for kept in itertools.product([False, True], repeat=len(LAYERS)):
        exclude = tuple(name for name, keep in zip(LAYERS, kept) if keep)
        if len(exclude) < len(LAYERS):
            other = gc.compress(net(), gc.Quantize(W3A8, correct=False, exclude=exclude), data()).model
            errors += [error(other)] if cost(other) <= amount * 16 else []
    # Of so few layers a choice may end a layer short of the budget: predictions share out what boundaries cost.
    assert error(result.model) <= 1.6 * min(errors)


def test_the_costs_of_layers_add_up_to_what_models_in_one_option_take() -> None:
    result = quantized(gc.Latency(0.25, target=Clockwork(cost)))
    assert all(in_integers(result.model).values())
    assert result.report.steps[0].numbers["latency_predicted_ms"] == pytest.approx(4.0)
    (note,) = [note for note in result.report.steps[0].notes if "with all layers in one option" in note]
    assert "W8A8 0.250, floating point 1.000; 5 models timed" in note  # 2 uniform, and 3 kinds: two layers are alike


def test_three_options_are_shared_out_too() -> None:
    """Weights alone save half of what integers do, and cost nothing on the way."""

    def half(model: Any) -> float:
        layers = [model.get_submodule(name) for name in LAYERS]
        return sum(4.0 if not isinstance(m, QuantizedLayer) else 2.5 if m.input_format is None else 1.0 for m in layers)

    result = quantized(gc.Latency(0.5, target=Clockwork(half)), (None, gc.W8A16, gc.W8A8))
    assert half(result.model) <= 8.0
    assert result.report.steps[0].numbers["latency_predicted_ms"] == pytest.approx(half(result.model))


def test_with_a_solver_the_layers_that_stay_are_not_touched(tmp_path: Any) -> None:
    result = quantized(gc.Latency(0.6, target=Clockwork(cost)), (None, W3A8), solver=gc.solvers.GPTQ(rounds=1))
    model, original = result.model, net()
    for name, found in in_integers(model).items():
        if not found:
            assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
    assert any(str(row.reason).startswith("GPTQ: ") for row in result.report.steps[0].layers)
    result.save(tmp_path / "slim")
    again, x = gc.load(tmp_path / "slim", net()), next(iter(data().calibration_batches))
    assert torch.equal(again(x), model(x))


def test_a_refined_choice_that_is_too_slow_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(trial: Any, options: Any, saved: Any, fronts: Any, chosen: dict[str, int], *args: Any) -> dict[str, int]:
        return dict.fromkeys(chosen, 1)  # floating point everywhere

    monkeypatch.setattr(module, "_refine", worse)
    result = quantized(gc.Latency(0.6, target=Clockwork(cost)))
    assert cost(result.model) <= 0.6 * 16
    assert any("was timed beyond the budget, and left" in note for note in result.report.steps[0].notes)


def test_a_budget_out_of_reach_is_refused_before_losses_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_single_losses", lambda *_: pytest.fail("losses were measured"))
    for budget in (gc.Latency(0.2, target=Clockwork(cost)), gc.Latency(20, ms=True, target=Clockwork(cost))):
        with pytest.raises(ConfigError, match=r"cannot be met|within this budget already"):
            quantized(budget)


def test_bytes_may_leave_layers_in_floating_point_too() -> None:
    step = gc.Quantize(to=gc.Bytes(0.8), options=(None, gc.Int(3)), correct=False)
    result = gc.compress(net(), step, data())
    found = in_integers(result.model)
    assert found["little"] and not found["head"]
    with pytest.raises(NothingChangedError, match="leaves all layers in floating point"):
        gc.compress(net(), gc.Quantize(to=gc.Bytes(1.0), options=(None, gc.Int(3))), data())


def test_layers_of_one_weight_stay_together_and_recurrent_layers_too() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn = nn.Embedding(40, 16), nn.GRU(16, 16, batch_first=True)
            self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.mix(self.rnn(self.words(x))[0])))
            return y

    def words(model: Any) -> float:
        return 5.0 + sum(isinstance(m, (nn.Linear, nn.Embedding)) for m in model.modules())

    torch.manual_seed(0)
    tokens = gc.Data(calibration=[torch.randint(0, 40, (8, 10)) for _ in range(4)])
    step = gc.Quantize(to=gc.Latency(0.9, target=Clockwork(words)), options=(None, gc.Int(4)))
    result = gc.compress(Language().eval(), step, tokens)
    model: Any = result.model
    assert isinstance(model.mix, QuantizedLayer)
    assert type(model.rnn) is nn.GRU and model.head.weight is model.words.weight
    assert isinstance(model.head, nn.Linear) and not isinstance(model.head, QuantizedLayer)


def test_a_convolution_before_one_in_floating_point_needs_an_output_grid() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    traced = trace(model, lambda net: net(torch.randn(1, 3, 9, 9)))
    assert layers_with_output_grids(model, ["0", "2", "4"], traced) == set()
    assert layers_with_output_grids(model, ["0", "4"], traced) == {"0"}
    assert layers_with_output_grids(model, ["0", "2"], traced) == {"2"}


def test_a_convolution_before_a_norm_that_is_not_folded_needs_one_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    traced = trace(model, lambda net: net(torch.randn(1, 3, 9, 9)))
    assert "0" in layers_with_output_grids(model, ["0", "3"], traced)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (gc.Latency(0.2, target=Clockwork(cost)), OPTIONS, r"cannot be met; .* is 4 ms of 16 ms \(0.250\)"),
        (gc.Latency(20, ms=True, target=Clockwork(cost)), OPTIONS, r"within this budget already \(16 ms\)"),
        (gc.Latency(0.5), OPTIONS, "no target to measure on"),
        (gc.Latency(0.5, target=Clockwork(cost)), (None,), "two schemes at least"),
        (gc.Latency(0.5, target=Clockwork(cost)), (None, None), "is an option once"),
        (gc.MACs(0.5), OPTIONS, "bytes or latency"),
    ],
)
def test_budgets_that_cannot_be_met_say_why(budget: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantized(budget, options)
