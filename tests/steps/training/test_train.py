from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gracile.compress import compress
from gracile.context import Context, Progress
from gracile.data import Data
from gracile.errors import DataError
from gracile.formats import Int, PerChannel, PerTensor
from gracile.losses import cross_entropy
from gracile.nn import begin_training, end_training
from gracile.recipe import Recipe, Recorder
from gracile.steps import SGD, AdamW, Distill, Finetune, Quantize
from gracile.steps.training.train import Schedule, _groups, train
from gracile.steps.training.training_data import Split, split_training


def blobs(count: int = 96) -> TensorDataset:
    """Three classes that a small net learns to tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 6, generator=generator)
    return TensorDataset(centres[labels] + 0.7 * torch.randn(count, 6, generator=generator), labels)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)).eval()


def context(model: nn.Module, seed: int = 0, **settings: Any) -> Context:
    loader = DataLoader(blobs(), batch_size=16, shuffle=True)
    original = copy.deepcopy(model).eval()
    data = Data(train=loader, loss=cross_entropy)
    return Context(data=data, original=original, teacher=original, seed=seed, **settings)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held_out_loss(model: nn.Module, ctx: Context) -> float:
    assert ctx.data.train is not None
    split = split_training(ctx.data.train, 0.25, ctx.generator("held out"))
    with torch.no_grad():
        parts = [(F.cross_entropy(model.eval()(x), y).item(), len(x)) for x, y in split.validation]
    return sum(loss * n for loss, n in parts) / sum(n for _, n in parts)


def test_training_lowers_the_held_out_loss_and_says_by_how_much() -> None:
    model = net()
    ctx = context(model)
    before = held_out_loss(model, ctx)
    record = Finetune(epochs=4, optimizer=AdamW(1e-2), held_out=0.25)(model, ctx)
    assert record.numbers["held_out_loss_before"] == pytest.approx(before, rel=1e-5)
    assert record.numbers["held_out_loss"] == pytest.approx(held_out_loss(model, ctx), rel=1e-5)
    assert record.numbers["held_out_loss"] < 0.7 * before
    assert record.notes == ("24 of 96 training examples held out to choose the epoch",)


def test_training_that_only_harms_is_undone_bit_for_bit() -> None:
    model = net()
    ctx = context(model)
    Finetune(epochs=6, optimizer=AdamW(1e-2), held_out=0.25)(model, ctx)
    before = state(model)
    record = Finetune(epochs=2, optimizer=SGD(learning_rate=30.0), held_out=0.25)(model, ctx)
    assert record.numbers["best_epoch"] == 0
    assert same(state(model), before)
    assert any("No epoch lowered" in note for note in record.notes)


class Scripted:
    """An objective that leaves a mark on the weights at every step, and held-out losses by script."""

    def __init__(self, losses: list[float]) -> None:
        self.losses: Iterator[float] = iter(losses)

    def __call__(self, model: Any, batch: Tensor) -> Tensor:
        if model.training:
            return (model.weight * 1.0).sum()
        return torch.tensor(next(self.losses))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5.0, 4.0, 3.0, 3.5], 2),
        ([5.0, 6.0, 7.0, 8.0], 0),
        ([5.0, 4.0, 4.0, 4.0], 1),
        ([5.0, float("nan"), 4.0, 6.0], 2),
        ([5.0, float("inf"), float("inf"), float("inf")], 0),
        ([5.0, 4.0, float("inf"), float("inf")], 1),
        ([5.0, float("nan"), float("nan"), float("nan")], 0),
        ([float("nan"), 4.0, 3.0, 9.0], 2),
        ([float("inf")] * 4, 0),
    ],
)
def test_the_best_epoch_wins_and_one_that_is_not_finite_never_does(losses: list[float], best: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    weights = [model.weight.item()]
    split = Split([torch.ones(2, 1)], [torch.ones(2, 1)], 1, "")

    def told(progress: Progress) -> None:
        weights.append(model.weight.item())

    recorder = Recorder(Finetune())
    ctx = Context(Data(), model, model, on_progress=told)
    train(model, Scripted(losses), split, Schedule(3, SGD(0.1, momentum=0), False), ctx, recorder)
    assert recorder.numbers["best_epoch"] == best
    assert model.weight.item() == weights[best]
    assert len(set(weights)) == 4


def test_with_nothing_held_out_the_last_epoch_is_kept() -> None:
    model = nn.Linear(1, 1, bias=False)
    recorder = Recorder(Finetune())
    start = model.weight.item()
    split = Split([torch.ones(2, 1)], [], 1, "")
    train(model, Scripted([]), split, Schedule(2, SGD(0.1, momentum=0), False), Context(Data(), model, model), recorder)
    assert recorder.numbers == {"best_epoch": 2} and model.weight.item() < start


def test_evaluation_data_are_never_read() -> None:
    class Forbidden(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("evaluation data were read")

    model = net()
    data = Data(
        train=DataLoader(blobs(), batch_size=32), evaluation=Forbidden(), metric=lambda o, b: o, loss=cross_entropy
    )
    original = copy.deepcopy(model)
    for step in (Finetune(epochs=1), Distill(epochs=1)):
        step(model, Context(data, original, original))


@pytest.mark.parametrize(
    "step", [Finetune(epochs=2, held_out=0.25), Distill(epochs=2, label_weight=0.5, held_out=0.25)]
)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(step: Any) -> None:
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = net()
        with torch.no_grad():
            model[0].weight[0] += 1
        torch.manual_seed(noise)  # the caller's random state has no say
        step(model, context(net(), seed))
        results.append(state(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", [SGD(0.05), AdamW(5e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("killed_at", [3, 5, 9, 14])
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tmp_path: Path, optimizer: Any, killed_at: int) -> None:
    step = Finetune(epochs=3, optimizer=optimizer, held_out=0.25)  # 5 batches an epoch
    whole = net()
    record = step(whole, context(whole, directory=tmp_path / "whole"))
    told: list[int] = []

    def stop(progress: Progress) -> None:
        told.append(progress.done)
        if progress.done == killed_at and len(told) == killed_at:
            raise Killed

    part = net()
    with pytest.raises(Killed):
        step(part, context(part, directory=tmp_path / "part", on_progress=stop))
    again, resumed = net(), []
    ctx = context(again, directory=tmp_path / "part", on_progress=lambda p: resumed.append(p.done))
    repeated = step(again, ctx)
    assert same(state(again), state(whole))
    assert repeated.numbers == record.numbers
    assert resumed[0] == 5 * ((killed_at - 1) // 5) + 1  # no finished epoch is trained again


def pruned() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    return model


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(1e-2)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("kind", [Distill, Finetune])
def test_zeros_stay_exactly_zero_and_the_rest_is_trained(kind: Any, optimizer: Any) -> None:
    model = pruned()
    before = state(model)
    kind(epochs=2, optimizer=optimizer, held_out=0)(model, context(net(3)))
    for name in ("0.weight", "4.weight"):
        zeros = before[name] == 0
        after = model.state_dict()[name]
        assert torch.equal(after == 0, zeros)
        assert bool((after != before[name])[~zeros].all())


def test_quantized_layers_learn_their_grids_and_keep_what_was_pruned() -> None:
    model = pruned()
    ctx = context(net(3))
    zeros = {name: model.get_parameter(name) == 0 for name in ("0.weight", "4.weight")}
    Quantize(Int(4, PerChannel(0)))(model, ctx)
    scales = {name: value.clone() for name, value in model.state_dict().items() if "scale" in name}
    codes = model[0].weight_codes.clone()
    Distill(epochs=2, optimizer=AdamW(2e-2), held_out=0)(model, ctx)
    for name, value in scales.items():
        learned = model.state_dict()[name]
        assert not torch.equal(learned, value) and torch.equal(learned.sign(), value.sign())
    assert not torch.equal(model[0].weight_codes, codes)
    for name, mask in zeros.items():
        layer: Any = model.get_submodule(name[0])
        weight = layer.decoded_weight()
        assert bool((weight[mask] == 0).all())
        steps = (weight / layer.weight_scale[:, None]).numpy()
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)  # a quotient of float32 numbers up to 8
        assert not layer.trains and "weight" not in dict(layer.named_parameters())


def test_weights_that_rounding_made_zero_may_change() -> None:
    """Only pruned ones stay; in two bits half of all codes are zero, and rows of nothing else say nothing."""
    model, ctx = net(), context(net(3))
    model[0].weight.data[3] = 1e-9  # not zero, and yet a row of nothing but zeros once it is rounded
    Quantize(Int(2, PerTensor()))(model, ctx)
    zeros = model[0].decoded_weight() == 0
    assert 0.2 < float(zeros.float().mean()) < 1 and bool(zeros[3].all())
    Distill(epochs=2, optimizer=AdamW(5e-2), held_out=0)(model, ctx)
    weight = model[0].decoded_weight()
    assert bool((weight[zeros] != 0).any()) and not bool(weight[3].any())


def test_a_row_of_padding_does_not_freeze_the_zeros_of_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16, padding_idx=0), nn.Flatten(), nn.Linear(64, 3)).eval()
    assert not bool(model[0].weight[0].any())
    batches = [(torch.randint(0, 9, (16, 4)), torch.randint(0, 3, (16,))) for _ in range(6)]
    original = copy.deepcopy(model)
    ctx = Context(Data(train=batches), original, copy.deepcopy(original))
    ctx.teacher[2].weight.data.normal_()
    Quantize(Int(2), exclude=("2",))(model, ctx)
    assert not model[0].sparse
    zeros = model[0].decoded_weight() == 0
    Distill(epochs=2, optimizer=AdamW(0.3), held_out=0)(model, ctx)
    after = model[0].decoded_weight()
    assert not bool(after[0].any()) and bool((after[zeros] != 0).any())


def test_scales_do_not_decay() -> None:
    model, ctx = net(), context(net(3))
    Quantize(Int(4, PerTensor()), correct=False)(model, ctx)
    begin_training(model)
    groups = _groups(model, list(model.parameters()))
    learned = [name for name, _ in model.named_parameters() if name.endswith("scale_change")]
    assert len(learned) == len(groups[1]["params"]) == 2 and groups[1]["weight_decay"] == 0
    assert len(groups[0]["params"]) + 2 == len(list(model.parameters()))
    end_training(model)


def test_flags_modes_and_gradients_are_as_before_also_after_an_error() -> None:
    for bad in (False, True):
        model = net().train()
        model[1].eval()
        model[4].bias.requires_grad_(False)
        frozen = model[4].bias.clone()
        ctx = context(model)
        Quantize(Int(8), exclude=("4",), correct=False)(model, ctx)
        if bad:
            objective = Data(train=ctx.data.train, loss=lambda o, b: cross_entropy(o, b) * float("nan"))
            ctx = Context(objective, ctx.original, ctx.teacher)
            with pytest.raises(DataError, match="not finite"):
                Finetune()(model, ctx)
        else:
            Finetune()(model, ctx)
            assert torch.equal(model[4].bias, frozen)  # what was frozen is not trained
        assert [m.training for m in model] == [True, False, True, True, True] and model.training
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["4.bias"]
        assert all(p.grad is None for p in model.parameters())
        assert not model[0].trains


def test_a_model_frozen_altogether_is_trained_and_stays_frozen() -> None:
    model = net().requires_grad_(False)
    before = state(model)
    Finetune(held_out=0)(model, context(model))
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert not any(p.requires_grad for p in model.parameters())


def test_the_random_state_of_the_caller_is_left_alone_by_the_loop() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = torch.random.get_rng_state()
    split = Split([torch.ones(2, 1)], [torch.ones(2, 1)], 1, "")
    schedule = Schedule(1, SGD(0.1), False)
    train(model, Scripted([1.0, 2.0]), split, schedule, Context(Data(), model, model), Recorder(Finetune()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gradients_flow_even_where_the_caller_turned_them_off() -> None:
    model = net()
    before = state(model)
    with torch.no_grad():
        Finetune(held_out=0)(model, context(model))
    assert not same(state(model), before)


def test_the_rate_warms_up_and_decays_along_a_cosine() -> None:
    schedule = Schedule(3, SGD(2.0), False)
    expected = {0.0: 1e-3, 0.025: 0.5, 0.05: 1.0, 0.525: 0.5, 1.0: 1e-3, 1.2: 1e-3}
    for progress, rate in expected.items():
        assert schedule.rate(progress) == pytest.approx(2 * rate)
    assert math.isclose(0.525, (1 + 0.05) / 2)  # the middle of the decay


def test_parts_of_a_schedule_have_the_rates_of_the_whole_one() -> None:
    whole = Schedule(4, SGD(2.0), False)
    parts = [Schedule(1, SGD(2.0), False, (0.0, 0.25)), Schedule(3, SGD(2.0), False, (0.25, 1.0))]
    for step in range(8):  # two steps in an epoch
        part, done = (parts[0], step / 2) if step < 2 else (parts[1], (step - 2) / 6)
        assert part.rate(done) == pytest.approx(whole.rate(step / 8))


def test_progress_counts_all_steps() -> None:
    told: list[Progress] = []
    model = net()
    Finetune(epochs=2, held_out=0.25)(model, context(model, on_progress=told.append))
    assert [p.done for p in told] == list(range(1, 11)) and {p.total for p in told} == {10}
    assert told[-1].note.startswith("epoch 2/2, loss ")


def test_mixed_precision_trains_float32_weights() -> None:
    model = net()
    record = Finetune(epochs=3, optimizer=AdamW(1e-2), held_out=0.25, mixed_precision=True)(model, context(model))
    assert record.numbers["held_out_loss"] < record.numbers["held_out_loss_before"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("gracile.steps.training.train.has_bfloat16", lambda: native)
    seen = set()
    model = net()
    watch = model.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    record = Finetune(epochs=1, held_out=0, mixed_precision=True)(model, context(model))
    watch.remove()
    assert (torch.bfloat16 in seen) == native
    assert any("only emulates bfloat16" in note for note in record.notes) != native


@pytest.mark.parametrize("recipe", [(Distill(epochs=1),), (Finetune(epochs=1),), (Quantize(Int(4)), Distill(epochs=1))])
def test_nets_that_take_a_view_of_a_convolution_can_be_trained(recipe: tuple[Any, ...]) -> None:
    model = nets.ZOO["Literals"]()
    x = torch.randn(16, *nets.example_for(model).shape[1:])
    data = Data(train=[(part, torch.arange(4)) for part in x.split(4)], loss=cross_entropy, calibration=[x])
    result = compress(model, Recipe(*recipe), data)
    assert result.report.steps[-1].numbers["best_epoch"] >= 0
    assert result.model.conv.weight.is_contiguous() and result.model(x).shape == (16, 4)
