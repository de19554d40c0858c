"""What every distillation loss must satisfy. A new loss joins by one row of MEMBERS."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gracile.data import Batch
from gracile.errors import ConfigError
from gracile.losses import CosineDistance, DistillationLoss, HardLabels, Hint, MeanSquaredError, SoftLabels


@dataclass(frozen=True)
class Member:
    loss: DistillationLoss
    minimum: float | None = (
        0.0  # value when student equals teacher; None where equal decisions, not equal outputs, are the aim
    )


MEMBERS = [
    Member(SoftLabels()),
    Member(SoftLabels(temperature=1.0)),
    Member(HardLabels(), minimum=None),
    Member(CosineDistance()),
    Member(MeanSquaredError()),
    Member(Hint()),
    Member(Hint(("layers.*",), weight=0.5)),
]

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(m.loss))
each_shape = pytest.mark.parametrize("shape", [(8, 10), (2, 7, 5), (1, 3)])


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@each_member
@each_shape
def test_a_finite_scalar_with_a_gradient_for_the_student_only(member: Member, shape: tuple[int, ...]) -> None:
    student, teacher = (t.requires_grad_() for t in pair(shape))
    loss = member.loss(student, teacher)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() > 0
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0


@each_member
@each_shape
def test_minimal_where_the_student_equals_the_teacher(member: Member, shape: tuple[int, ...]) -> None:
    _, teacher = pair(shape)
    teacher = teacher * 30  # far apart, so that the decision of hard labels is nearly certain
    at_teacher = member.loss(teacher, teacher).item()
    assert member.loss(teacher.roll(1, dims=-1), teacher).item() > at_teacher
    if member.minimum is None:
        return
    # Differences of float32 logarithms and cosines around 1 round to a few 1e-7.
    assert at_teacher == pytest.approx(member.minimum, abs=2e-6)
    for seed in range(5):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert member.loss(teacher + 30 * noise, teacher).item() > at_teacher


@each_member
def test_descending_reaches_the_teachers_decision(member: Member) -> None:
    student, teacher = pair((6, 4))
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    first = member.loss(student, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = member.loss(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    assert torch.equal(student.argmax(dim=-1), teacher.argmax(dim=-1))


@each_member
@each_shape
def test_unchanged_when_the_batch_is_duplicated(member: Member, shape: tuple[int, ...]) -> None:
    student, teacher = pair(shape)
    once = member.loss(student, teacher).item()
    twice = member.loss(torch.cat([student, student]), torch.cat([teacher, teacher])).item()
    assert twice == pytest.approx(once, rel=1e-5)  # another order of float32 sums


@each_member
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(member: Member, dtype: torch.dtype) -> None:
    student, teacher = ((t * 500).to(dtype) for t in pair((8, 10)))
    loss = member.loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.equal(loss, member.loss(student.float(), teacher.float()))


@each_member
def test_another_shape_names_both(member: Member) -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 12)
    with pytest.raises(ConfigError, match=r"\(4, 10\).*\(4, 12\)"):
        member.loss(student, teacher)


@each_member
def test_outputs_with_logits_are_read(member: Member) -> None:
    student, teacher = pair((4, 6))
    outputs: list[Batch] = [{"logits": student}, (student, torch.zeros(3))]
    for output in outputs:
        assert torch.equal(member.loss(output, {"logits": teacher}), member.loss(student, teacher))
