from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gracile.context import Context
from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.formats import W4A8
from gracile.losses import HardLabels, SoftLabels, cross_entropy
from gracile.steps import SGD, AdamW, Distill, Finetune, Quantize

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(1))
ONE_STEP = SGD(learning_rate=0.5, momentum=0, weight_decay=0)


def linear(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, classes))


def context(teacher: nn.Module, **data: Any) -> Context:
    return Context(Data(**{"train": [(X, Y)], "loss": cross_entropy, **data}), teacher, teacher)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


@pytest.mark.parametrize("label_weight", [0.0, 0.25])
def test_one_step_is_that_of_the_formula_in_numpy(label_weight: float) -> None:
    """τ²·KL has the gradient τ·(softmax(s/τ) − softmax(t/τ)) in the logits; the first step of warm-up has rate 1e-3."""
    student, teacher, tau = linear(0), linear(1), 3.0
    x, y = X.double().numpy(), Y.numpy()
    w, b = (p.detach().double().numpy() for p in student[0].parameters())
    s = x @ w.T + b
    t = x @ teacher[0].weight.detach().double().numpy().T + teacher[0].bias.detach().double().numpy()
    delta = (1 - label_weight) * tau * (softmax(s / tau) - softmax(t / tau))
    delta += label_weight * (softmax(s) - np.eye(3)[y])
    step = Distill(losses=(SoftLabels(tau),), label_weight=label_weight, optimizer=SGD(100.0, 0, 0), held_out=0)
    step(student, context(teacher))
    # Rate 100 · 1e-3; float32 weights of size 0.4 hold changes to 3e-8.
    np.testing.assert_allclose(student[0].weight.detach(), w - 0.1 * delta.T @ x / 32, atol=2e-6)
    np.testing.assert_allclose(student[0].bias.detach(), b - 0.1 * delta.mean(0), atol=2e-6)


def test_losses_add_up() -> None:
    moved = []
    for losses in ((SoftLabels(2.0),), (HardLabels(),), (SoftLabels(2.0), HardLabels())):
        student = linear(0)
        before = student[0].weight.detach().clone()
        Distill(losses=losses, optimizer=SGD(100.0, 0, 0), held_out=0)(student, context(linear(1)))
        moved.append((student[0].weight - before).detach())
    torch.testing.assert_close(moved[0] + moved[1], moved[2], rtol=0, atol=2e-6)


def test_the_teacher_answers_in_eval_mode_and_is_left_as_it_was() -> None:
    teacher = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    teacher[1].eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes: list[bool] = []
    teacher.register_forward_hook(lambda module, *_: modes.append(any(m.training for m in module.modules())))
    Distill(epochs=2)(linear(0), context(teacher))
    assert modes and not any(modes)
    assert [m.training for m in teacher] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    student = linear(0)
    teacher = copy.deepcopy(student)
    step = Distill(optimizer=SGD(10.0, 0, 0), held_out=0.5)
    record = step(student, context(teacher, train=[(X[:16], Y[:16]), (X[16:], Y[16:])]))
    assert record.numbers["held_out_loss_before"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student[0].weight, teacher[0].weight, rtol=0, atol=1e-6)


def test_labels_are_not_needed_without_their_weight() -> None:
    record = Distill()(linear(0), Context(Data(train=[X]), linear(1), linear(1)))
    assert [(row.name, row.action) for row in record.layers] == [("(all)", "trained")]


@pytest.mark.parametrize("step", [Distill(optimizer=AdamW(0.05)), Finetune(optimizer=AdamW(0.05))])
def test_rows_have_the_ranges_that_inputs_were_trained_to(step: Distill | Finetune) -> None:
    model, teacher = nn.Sequential(linear(0, 6), nn.ReLU(), nn.Linear(6, 3)), linear(1)
    ctx = Context(Data(calibration=[X], train=[(X, Y)], loss=cross_entropy), teacher, teacher)
    before = {row.name: row.range for row in Quantize(W4A8, exclude=("2",))(model, ctx).layers if row.range}
    after = {row.name: row for row in step(model, ctx).layers}
    assert set(after) == {"(all)", "0.0"} == {"(all)", *before}
    codes = after["0.0"].range[1] / float(model[0][0].input_scale) + int(model[0][0].input_zero_point)  # type: ignore[index]
    assert codes == pytest.approx(255) and after["0.0"].range != before["0.0"]
    assert after["0.0"].action == "trained" and after["0.0"].sparsity == float((model[0][0].weight == 0).float().mean())


def test_training_that_is_taken_back_has_no_row_for_a_layer() -> None:
    model, teacher = nn.Sequential(linear(0, 6), nn.ReLU(), nn.Linear(6, 3)), linear(1)
    ctx = Context(Data(calibration=[X], train=[X[:16], X[16:]]), teacher, teacher)
    Quantize(W4A8, exclude=("2",))(model, ctx)
    record = Distill(optimizer=AdamW(1e4), held_out=0.5)(model, ctx)  # 10 in its first and only step
    assert record.numbers["best_epoch"] == 0 and [row.name for row in record.layers] == ["(all)"]


@pytest.mark.parametrize(
    ("step", "data", "error", "message"),
    [
        (Distill(), Data(calibration=[X]), DataError, "needs training data"),
        (Distill(label_weight=0.5), Data(train=[(X, Y)]), DataError, "needs a loss"),
        (Distill(), Data(train=[]), DataError, "no batches"),
        (Finetune(), Data(train=[(X, Y)]), DataError, "labelled training data and a loss"),
        (Finetune(), Data(loss=cross_entropy), DataError, "labelled training data and a loss"),
    ],
)
def test_data_that_cannot_train_are_refused_before_anything_is_changed(
    step: Any, data: Data, error: type[Exception], message: str
) -> None:
    student = linear(0)
    before = student[0].weight.detach().clone()
    with pytest.raises(error, match=message):
        step(student, Context(data, linear(1), linear(1)))
    assert torch.equal(student[0].weight, before)


def test_a_teacher_of_other_classes_is_refused_with_both_shapes_and_modes_restored() -> None:
    student, teacher = linear(0).train(), linear(1, classes=4).train()
    teacher[0].eval()
    with pytest.raises(ConfigError, match=r"\(32, 3\).*\n?.*\(32, 4\)"):
        Distill().check(student, context(teacher))
    assert student.training and teacher.training and not teacher[0].training


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Distill(losses=()),
        lambda: Distill(losses=[SoftLabels()]),  # type: ignore[arg-type]
        lambda: Distill(losses=("soft",)),
        lambda: Distill(losses=SoftLabels()),  # type: ignore[arg-type]
        lambda: Distill(epochs=0),
        lambda: Distill(epochs=1.5),  # type: ignore[arg-type]
        lambda: Distill(epochs=True),
        lambda: Distill(label_weight=1),
        lambda: Distill(label_weight=-0.1),
        lambda: Distill(mixup=1.5),
        lambda: Distill(mixup=0.5, label_weight=0.5),
        lambda: Distill(held_out=1),
        lambda: Finetune(epochs=-1),
        lambda: Finetune(held_out=-0.1),
    ],
)
def test_impossible_settings_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        bad()


def test_mixed_examples_are_the_same_for_student_and_teacher_and_only_trained_on() -> None:
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}

    class Seeing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen[self.role].append(x.detach())  # type: ignore[index]
            return super().forward(x)

    student, teacher = Seeing(2, 3), Seeing(2, 3)
    student.role, teacher.role = "student", "teacher"  # type: ignore[assignment]
    x = torch.arange(16.0).reshape(8, 2)
    step = Distill(epochs=40, mixup=0.5, held_out=0.5, optimizer=SGD(1e-3))
    context = Context(Data(train=[x, -x]), student, teacher)
    step.check(student, context)
    for role in seen:
        seen[role].clear()
    step(student, context)
    assert all(torch.equal(a, b) for a, b in zip(seen["student"][1:], seen["teacher"][1:]))
    whole = {tuple(row) for row in (*x.tolist(), *(-x).tolist())}
    rows = [tuple(row) for batch in seen["student"] for row in batch.tolist()]
    mixed = sum(row not in whole for row in rows)
    assert 104 <= mixed <= 176, "of 320 a half, less an eighth paired with themselves: 140 and four deviations of nine"


def test_mixup_of_token_ids_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    data = Data(train=[torch.zeros(4, 2, dtype=torch.long)])
    with pytest.raises(DataError, match="token ids"):
        Distill(mixup=0.5).check(model, Context(data, model, model))


def test_titles_are_for_people() -> None:
    assert (
        Distill(losses=(SoftLabels(), HardLabels()), epochs=2).title
        == "Distill with SoftLabels + HardLabels for 2 epochs"
    )
    assert Finetune().title == "Fine-tune for 1 epoch"
