"""Soft-label and hard-label distillation as the textbook writes them: values and gradients by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gracile.losses import HardLabels, SoftLabels


def softmax(z: np.ndarray) -> np.ndarray:
    exp = np.exp(z - z.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def networks(kind: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        student = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))
        teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))
        return student, teacher, torch.randn(9, 6)
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 5))
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return student, teacher, torch.randn(9, 1, 6, 6)


@pytest.fixture(params=["mlp", "conv net"])
def outputs(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher, x = networks(request.param)
    return (3 * student(x)).detach().requires_grad_(), (3 * teacher(x)).detach()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_labels(outputs: tuple[torch.Tensor, torch.Tensor], temperature: float) -> None:
    student, teacher = outputs
    loss = SoftLabels(temperature)(student, teacher)
    loss.backward()
    z_s, z_t = student.detach().double().numpy(), teacher.double().numpy()
    p, q = softmax(z_t / temperature), softmax(z_s / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    gradient = temperature * (q - p) / len(p)
    # float32 against float64; a KL of order 0.1 is a sum of terms of order 1.
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(student.grad, gradient, rtol=1e-4, atol=1e-7)
    assert expected > 0.01


def test_hard_labels(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = outputs
    loss = HardLabels()(student, teacher)
    loss.backward()
    q = softmax(student.detach().double().numpy())
    decided = teacher.numpy().argmax(axis=1)
    rows = np.arange(len(q))
    assert loss.item() == pytest.approx(-np.log(q[rows, decided]).mean(), rel=1e-5)
    np.testing.assert_allclose(student.grad, (q - np.eye(q.shape[1])[decided]) / len(q), rtol=1e-4, atol=1e-7)


def test_the_mix_of_both_is_their_weighted_sum(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = outputs
    mixed = 0.9 * SoftLabels(4)(student, teacher) + 0.1 * HardLabels()(student, teacher)
    z_s, z_t = student.detach().double().numpy(), teacher.double().numpy()
    p, q = softmax(z_t / 4), softmax(z_s / 4)
    hard = -np.log(softmax(z_s)[np.arange(len(z_s)), z_t.argmax(axis=1)]).mean()
    assert mixed.item() == pytest.approx(0.9 * 16 * (p * np.log(p / q)).sum(axis=1).mean() + 0.1 * hard, rel=1e-5)
