from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gracile as gc
from gracile import artifact
from gracile.formats import Int
from gracile.steps import AdamW


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.drop, self.head = nn.Linear(8, 12), nn.Dropout(0.2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        out: Tensor = self.head(self.drop(torch.relu(self.hidden(y))))
        return out


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(**changes: Any) -> gc.Data:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 2, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].mean((1, 2)) > 0.1).long()
    examples = TensorDataset(x, y)
    settings: dict[str, Any] = {
        "calibration": [x[i : i + 8] for i in range(0, 48, 8)],
        "train": DataLoader(examples, batch_size=8, shuffle=True),
        "evaluation": DataLoader(examples, batch_size=16, shuffle=True),
        "metric": gc.metrics.accuracy,
        "loss": gc.losses.cross_entropy,
    }
    return gc.Data(**(settings | changes))


RECIPE = gc.Recipe(
    gc.Prune(0.3, pattern=gc.Channels()),
    gc.Prune(0.3, criterion=gc.Taylor()),
    gc.Distill(epochs=2, optimizer=AdamW(1e-2), held_out=0.25),
    gc.Quantize(gc.W8A8),
)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_model_and_the_teacher_given_are_not_touched() -> None:
    model, teacher = net().train(), net(1).train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones(3, 12)
    before, taught = state(model), state(teacher)
    result = gc.compress(model, RECIPE, data(), teacher=teacher)
    assert same(state(model), before) and same(state(teacher), taught)
    assert model.training and not model.norm.training and model.drop.training
    assert teacher.training and teacher.norm.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert torch.equal(model.head.weight.grad, torch.ones(3, 12))
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not hasattr(model, "gracile_edits")
    assert type(result.model) is Net and result.model is not model
    assert result.model.conv.out_channels < 8


def test_a_model_may_teach_itself() -> None:
    model = net().train()
    before = state(model)
    gc.compress(model, gc.Recipe(gc.Prune(0.5), gc.Distill()), data(), teacher=model)
    assert same(state(model), before) and model.training


def test_in_place_changes_the_model_given() -> None:
    model = net()
    result = gc.compress(model, RECIPE, data(), inplace=True)
    assert result.model is model and model.conv.out_channels < 8
    assert same(state(model), state(gc.compress(net(), RECIPE, data()).model))


def test_the_seed_decides_everything_and_the_caller_s_random_state_is_kept() -> None:
    results = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        model, d, teacher = net(), data(), net(9)
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        result = gc.compress(model, RECIPE, d, seed=seed, teacher=teacher)
        assert result.report.steps[2].numbers["best_epoch"] > 0  # or the seed would have nothing to decide
        results.append(state(result.model))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_the_journal_and_the_state_rebuild_the_model(tmp_path: Path) -> None:
    result = gc.compress(net(), RECIPE, data())
    loaded = gc.load(result.save(tmp_path / "slim"), net(7))
    x = torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    assert result.edits == tuple(e for record in result.report.steps for e in record.edits)
    assert artifact.read_journal(tmp_path / "slim")["provenance"]["seed"] == 0


class Killed(Exception):
    pass


def killed_at(event: int) -> Callable[[gc.Progress], None]:
    count = 0

    def stop(progress: gc.Progress) -> None:
        nonlocal count
        count += 1
        if count == event:
            raise Killed

    return stop


def test_a_run_killed_anywhere_ends_with_the_same_bits_and_redoes_no_finished_step(tmp_path: Path) -> None:
    told: list[gc.Progress] = []
    options: dict[str, Any] = {"teacher": net(9)}
    whole = gc.compress(net(), RECIPE, data(), run_dir=tmp_path / "whole", on_progress=told.append, **options)
    assert whole.report.steps[2].numbers["best_epoch"] > 0
    starts = [i + 1 for i, p in enumerate(told) if p.phase == "step"]
    middle = [i + 1 for i, p in enumerate(told) if p.phase == "train"]
    for event in sorted({*starts[1:4], middle[0], middle[len(middle) // 2], middle[-1]}):
        folder = tmp_path / str(event)
        with pytest.raises(Killed):
            gc.compress(net(), RECIPE, data(), run_dir=folder, on_progress=killed_at(event), **options)
        again: list[gc.Progress] = []
        result = gc.compress(net(), RECIPE, data(), run_dir=folder, on_progress=again.append, **options)
        assert same(state(result.model), state(whole.model)), event
        assert result.edits == whole.edits
        assert [r.title for r in result.report.steps] == [r.title for r in whole.report.steps]
        done = [p.done for p in told[: event - 1] if p.phase == "step"]
        assert next(p.done for p in again if p.phase == "step") == (done[-1] if event not in starts else len(done))


def test_a_compressed_model_can_be_compressed_further_saved_and_resumed(tmp_path: Path) -> None:
    first = gc.compress(net(), gc.Prune(0.3, pattern=gc.Channels()), data())
    second = gc.Recipe(gc.Prune(0.2, pattern=gc.Channels()), gc.Quantize(Int(8)), gc.Finetune(epochs=1))
    whole = gc.compress(first.model, second, data())
    assert whole.edits[: len(first.edits)] == first.edits
    told: list[gc.Progress] = []
    gc.compress(first.model, second, data(), run_dir=tmp_path / "whole", on_progress=told.append)
    steps = [i + 1 for i, p in enumerate(told) if p.phase == "step"]
    with pytest.raises(Killed):
        gc.compress(first.model, second, data(), run_dir=tmp_path / "run", on_progress=killed_at(steps[2]))
    resumed = gc.compress(first.model, second, data(), run_dir=tmp_path / "run")
    assert same(state(resumed.model), state(whole.model)) and resumed.edits == whole.edits
    loaded = gc.load(resumed.save(tmp_path / "slim"), net(3))
    assert same(state(loaded), state(whole.model))
    third = gc.compress(loaded, gc.Finetune(), data())
    assert third.edits == whole.edits


def test_another_run_s_directory_is_refused_with_what_differs(tmp_path: Path) -> None:
    d = data()
    gc.compress(net(), gc.Prune(0.3), d, run_dir=tmp_path / "run")
    for model, step, seed, changed in (
        (net(), gc.Prune(0.4), 0, "recipe"),
        (net(), gc.Prune(0.3), 1, "seed"),
        (net(5), gc.Prune(0.3), 0, "model"),
    ):
        with pytest.raises(gc.RunError, match=f"belongs to another run: {changed} differ"):
            gc.compress(model, step, d, seed=seed, run_dir=tmp_path / "run")
    other = data(calibration=[torch.zeros(2, 2, 6, 6)])
    with pytest.raises(gc.RunError, match="data differ"):
        gc.compress(net(), gc.Prune(0.3), other, run_dir=tmp_path / "run")


def test_a_request_that_is_refused_leaves_no_run_directory_behind(tmp_path: Path) -> None:
    with pytest.raises(gc.DataError, match="needs training data"):
        gc.compress(net(), gc.Recipe(gc.Prune(0.3), gc.Distill()), data(train=None), run_dir=tmp_path / "run")
    gc.compress(net(), gc.Recipe(gc.Prune(0.3), gc.Distill()), data(), run_dir=tmp_path / "run")


def test_later_steps_are_checked_before_the_first_one_runs() -> None:
    model = net()
    before = state(model)
    with pytest.raises(gc.DataError, match="needs training data"):
        gc.compress(model, gc.Recipe(gc.Prune(0.5), gc.Distill()), data(train=None), inplace=True)
    assert same(state(model), before)


def test_data_in_bfloat16_have_a_fingerprint(tmp_path: Path) -> None:
    batches = [torch.randn(4, 2, 6, 6).to(torch.bfloat16) for _ in range(2)]
    result = gc.compress(net().to(torch.bfloat16), gc.Prune(0.3), gc.Data(calibration=batches), run_dir=tmp_path)
    assert set(result.provenance["data"]) == {"calibration"}


def test_without_data_nothing_is_measured_and_the_report_says_so() -> None:
    result = gc.compress(net(), gc.Prune(0.5))
    assert result.report.verdict == "Not measured: no data to run the model on."
    assert result.met is None and not result.report.before


def test_before_and_after_are_measured_on_the_evaluation_data() -> None:
    model = net()
    result = gc.compress(model, gc.Prune(0.9), data())
    with torch.no_grad():
        for measured, judged in ((result.report.before, model.eval()), (result.report.after, result.model)):
            batches = list(data().evaluation)  # type: ignore[arg-type]
            right = sum(int((judged(x).argmax(1) == y).sum()) for x, y in batches)
            assert measured[0].quality is not None
            assert measured[0].quality["value"] == pytest.approx(right / 48)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: gc.compress(net(), "prune"), gc.ConfigError),  # type: ignore[arg-type]
        (lambda: gc.compress(net(), gc.Prune), gc.ConfigError),  # type: ignore[arg-type]
        (lambda: gc.compress(Net, gc.Prune(0.5)), gc.ModelError),  # type: ignore[arg-type]
        (lambda: gc.compress(net().state_dict(), gc.Prune(0.5)), gc.ModelError),  # type: ignore[arg-type]
        (lambda: gc.compress(nn.ReLU(), gc.Prune(0.5)), gc.ModelError),
        (lambda: gc.compress(net(), gc.Prune(0.5), [torch.ones(1)]), gc.DataError),  # type: ignore[arg-type]
        (lambda: gc.compress(net(), gc.Prune(0.5), teacher="big"), gc.ModelError),  # type: ignore[arg-type]
    ],
)
def test_mistakes_of_the_call_are_explained(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3


def test_deep_copies_share_nothing_with_the_original() -> None:
    model = net()
    result = gc.compress(model, gc.Prune(0.5), data())
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in result.model.parameters())
    assert copy.deepcopy(result.model)(torch.ones(1, 2, 6, 6)).shape == (1, 3)
