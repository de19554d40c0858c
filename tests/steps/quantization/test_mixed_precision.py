"""Formats chosen layer by layer: against all choices of a small net, within the bytes asked for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from gracile.artifact import load
from gracile.compress import compress
from gracile.context import Context
from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.evaluate.size import state_bytes
from gracile.formats import FP8, W8A8, Int
from gracile.goal import Bytes, MACs
from gracile.solvers import GPTQ
from gracile.stats.match import divergence, relative_error
from gracile.steps import Quantize
from gracile.steps.pruning.tables import outputs_of
from gracile.steps.quantization import mixed_precision as module
from gracile.steps.quantization.format_trial import split


class Net(nn.Module):
    """The middle layers differ in what they mean for the output: one feeds all of it, one next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.much, self.little = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y: Tensor = self.head(torch.relu(self.much(x)) + 0.02 * torch.relu(self.little(x)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    return Data(calibration=[torch.randn(32, 16, generator=generator) for _ in range(9)])


def context(model: nn.Module) -> Context:
    original = copy.deepcopy(model)
    return Context(data(), original, original)


OPTIONS = (Int(8), Int(4), Int(2))


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: m.weight_format.bits for name, m in model.named_modules() if hasattr(m, "weight_format")}


def test_no_other_choice_within_the_bytes_has_a_smaller_sum_of_measured_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 0)
    model = net()
    whole = state_bytes(model)
    record = Quantize(to=Bytes(0.2), options=OPTIONS, correct=False)(model, context(model))
    assert state_bytes(model) <= 0.2 * whole
    assert record.numbers["bytes"] == state_bytes(model)
    original, batches = net(), list(data().calibration_batches)
    expected = outputs_of(original, data(), batches)
    names = list(bits_of(model))
    losses: dict[tuple[str, int], float] = {}
    for name in names:
        for fmt in OPTIONS:
            alone = net()
            Quantize(fmt, correct=False, exclude=tuple(set(names) - {name}))(alone, context(alone))
            found = outputs_of(alone, data(), batches)
            losses[name, fmt.bits] = relative_error(
                *([y - y.mean(1, keepdim=True) for y in ys] for ys in (found, expected))
            )
    best = float("inf")
    for choice in itertools.product(OPTIONS, repeat=len(names)):
        size = whole
        for name, fmt in zip(names, choice):
            weight = original.get_submodule(name).weight
            size += fmt.size_bytes(weight.shape) - weight.nbytes  # type: ignore[operator,union-attr,arg-type]
        if size <= 0.2 * whole:
            best = min(best, sum(losses[name, fmt.bits] for name, fmt in zip(names, choice)))
    reached = sum(losses[name, bits] for name, bits in bits_of(model).items())
    # The knapsack counts savings in ten-thousandths of the amount; the losses here stand on all batches.
    assert reached <= 1.05 * best
    assert bits_of(model)["little"] < bits_of(model)["much"]


@pytest.mark.parametrize("solver", [None, GPTQ()], ids=["nearest", "GPTQ"])
def test_a_mix_is_nearer_to_the_original_than_one_format_of_as_many_bytes(solver: GPTQ | None) -> None:
    original, batches = net(), list(data().calibration_batches)
    expected = outputs_of(original, data(), batches)
    uniform = net()
    Quantize(Int(3), solver=solver)(uniform, context(uniform))
    size = state_bytes(uniform)
    mixed = net()
    Quantize(to=Bytes(size), options=(*OPTIONS, Int(3)), solver=solver)(mixed, context(mixed))
    assert state_bytes(mixed) <= size
    errors = [divergence(outputs_of(m, data(), batches), expected) for m in (uniform, mixed)]
    assert errors[1] < 0.8 * errors[0]


def test_the_original_and_the_models_norms_stay_as_they_are_while_options_are_tried(tmp_path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    batches = [torch.randn(8, 3, 6, 6) for _ in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = Quantize(to=Bytes(0.25), options=(Int(8), Int(3)), solver=GPTQ())
    result = compress(model.eval(), step, Data(calibration=batches))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save(tmp_path / "slim")
    again = load(tmp_path / "slim", copy.deepcopy(model))
    assert torch.equal(again(batches[0]), result.model(batches[0]))


def test_options_of_floating_point_are_rounded_by_the_solver_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 0)  # beside the others' errors the least layer's may be better in two bits
    model = net()
    record = Quantize(to=Bytes(0.5), options=(FP8(), Int(2)), solver=GPTQ(rounds=1))(model, context(model))
    assert {type(m.weight_format) for m in model.modules() if hasattr(m, "weight_format")} == {FP8}
    reasons = [str(row.reason) for row in record.layers if row.action == "quantized"]
    assert reasons and all(reason.startswith("GPTQ: ") for reason in reasons)


@pytest.mark.parametrize(("count", "solver"), [(9, GPTQ()), (40, GPTQ()), (2, GPTQ()), (1, GPTQ()), (9, None)])
def test_a_solver_sees_none_of_the_examples_that_formats_are_judged_on(count: int, solver: GPTQ | None) -> None:
    batches = [torch.full((32, 16), float(i)) for i in range(count)]
    fitted, judged = ([float(b[0, 0]) for b in part] for part in split(Data(calibration=batches), solver))
    assert judged and sorted({*fitted, *judged}) == list(range(count))
    assert bool({*fitted} & {*judged}) == (solver is None or count == 1)
    assert 32 * len(judged) <= 256 + 32 or solver is None


def test_grids_of_inputs_and_outputs_count_among_the_bytes() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    original = copy.deepcopy(model)
    batches = Data(calibration=[torch.randn(4, 3, 6, 6) for _ in range(3)])
    step = Quantize(to=Bytes(0.9), options=(W8A8, Int(8)), correct=False)
    record = step(model, Context(batches, original, original))
    assert record.numbers["bytes"] == state_bytes(model)


def test_budgets_that_cannot_be_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"nearest that these options reach is .* bytes"):
        Quantize(to=Bytes(0.01), options=OPTIONS)(net(), context(net()))
    with pytest.raises(ConfigError, match="one of bytes"):
        Quantize(to=MACs(0.5), options=OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two schemes at least"):
        Quantize(to=Bytes(0.5), options=(W8A8,))
    with pytest.raises(ConfigError, match="no scheme besides"):
        Quantize(W8A8, to=Bytes(0.5), options=OPTIONS)
    with pytest.raises(ConfigError, match="goes with a budget"):
        Quantize(W8A8, options=OPTIONS)
    with pytest.raises(ConfigError, match="'int8' is not a scheme"):
        Quantize(to=Bytes(0.5), options=(W8A8, "int8"))  # type: ignore[arg-type]
    model = net()
    with pytest.raises(DataError, match="chooses formats by what they do"):
        Quantize(to=Bytes(0.5), options=OPTIONS)(model, Context(Data(), model, model))


def deep() -> nn.Module:
    torch.manual_seed(5)
    layers = [m for i in range(6) for m in (nn.Linear(16 if i == 0 else 24, 24), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(24, 4)).eval()
    for i in range(0, 13, 2):
        nn.init.kaiming_normal_(net[i].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return net


def test_rounds_end_nearer_to_the_original_than_the_sum_of_single_losses_and_within_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole models of each choice, compared on the examples that choices are judged by."""
    divergences, told = {}, []
    for rounds in (0, 3):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        model = deep()
        options = tuple(Int(bits) for bits in (2, 3, 4, 5, 6, 8))
        record = Quantize(to=Bytes(0.15), options=options, correct=False)(model, context(model))  # the choice alone
        assert state_bytes(model) <= 0.15 * state_bytes(deep())
        batches = list(data().calibration_batches)
        divergences[rounds] = divergence(outputs_of(model, data(), batches), outputs_of(deep(), data(), batches))
        told += [note for note in record.notes if "with all layers in their formats" in note]
    assert len(told) == 1
    losses = [float(value) for value in told[0].rpartition(": ")[2].rstrip(".").split(", ")]
    assert 2 <= len(losses) <= 4 and losses[:-1] == sorted(losses[:-1], reverse=True)
    assert divergences[3] < divergences[0]


def test_neighbours_are_the_next_of_the_front_by_what_they_save() -> None:
    saved = [3.0, 1.0, 2.0, 4.0]
    assert module._neighbours(saved, [0, 1, 2, 3], 0) == [2, 0, 3]
    assert module._neighbours(saved, [0, 1, 2, 3], 1) == [1, 2]
    assert module._neighbours(saved, [0, 1, 3], 3) == [0, 3]
    assert module._neighbours(saved, [0, 1, 3], 0) == [1, 0, 3]


def test_options_that_others_beat_are_out() -> None:
    assert module._front([3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0]) == [0, 1, 2]  # of equals the first
    assert module._front([1.0, 1.0, 0.5], [1.0, 2.0, 3.0]) == [2]
    assert module._front([0.5, 0.5], [1.0, 1.0]) == [0]
