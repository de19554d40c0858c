from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from gracile.errors import ConfigError, DataError
from gracile.losses import (
    CosineDistance,
    HardLabels,
    MeanSquaredError,
    SoftLabels,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    next_token_cross_entropy,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_labels_against_scipy(temperature: float) -> None:
    student, teacher = normal(3, 5, 7), normal(3, 5, 7, seed=1)
    log_s, log_t = (log_softmax(t.double().numpy() / temperature, axis=-1) for t in (student, teacher))
    expected = temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(axis=-1).mean()
    # float32 logarithms differ by 1e-7; τ² of 400 and a cancelling sum magnify them.
    assert SoftLabels(temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_the_temperature_keeps_the_gradients_size() -> None:
    """For large τ the gradient tends to (s − t) / classes per example (Hinton et al., eq. 4, zero-mean logits)."""
    student, teacher = normal(1, 4), normal(1, 4, seed=1)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    SoftLabels(temperature=100.0)(student, teacher).backward()
    np.testing.assert_allclose(student.grad, (student.detach() - teacher) / 4, atol=0.02)


def test_hard_labels_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[5.0, 1.0]])
    assert HardLabels()(student, teacher).item() == pytest.approx(math.log(4))


def test_cosine_and_squared_error_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert CosineDistance()(student, teacher).item() == pytest.approx(0.5, abs=1e-6)
    assert MeanSquaredError()(student, teacher).item() == pytest.approx((9 + 4 + 1 + 1) / 4)
    assert CosineDistance()(torch.zeros(1, 3), torch.ones(1, 3)).item() == 1.0


@pytest.mark.parametrize("loss", [SoftLabels(), HardLabels()])
@pytest.mark.parametrize("shape", [(4, 1), ()])
def test_a_single_output_is_no_choice_between_classes(loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="MeanSquaredError"):
        loss(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("temperature", [0, -1, float("inf"), float("nan")])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        SoftLabels(temperature)


def expected_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    logs = log_softmax(logits.double().numpy(), axis=-1).reshape(-1, logits.shape[-1])
    flat = labels.numpy().reshape(-1)
    return float(np.mean([-logs[i, y] for i, y in enumerate(flat) if y != -100]))


def test_cross_entropy_of_examples_positions_and_images() -> None:
    logits, labels = normal(4, 3), torch.tensor([0, 2, 1, 1])
    assert cross_entropy(logits, (None, labels)).item() == pytest.approx(expected_cross_entropy(logits, labels))
    assert cross_entropy(logits, (None, labels[:, None])).item() == cross_entropy(logits, (None, labels)).item()
    sequence, tags = normal(2, 5, 3), torch.tensor([[0, 1, -100, 2, -100], [2, 2, 1, 0, -100]])
    value = cross_entropy({"logits": sequence}, {"labels": tags}).item()
    assert value == pytest.approx(expected_cross_entropy(sequence, tags))
    image = sequence.movedim(-1, 1)  # [batch, classes, positions]
    assert cross_entropy(image, (None, tags)).item() == pytest.approx(value)
    assert cross_entropy(sequence, (None, torch.full((2, 5), -100))).item() == 0.0


def test_cross_entropy_with_probabilities() -> None:
    logits, labels = normal(4, 3), normal(4, 3, seed=1).softmax(dim=-1)
    expected = -(labels.double().numpy() * log_softmax(logits.double().numpy(), axis=-1)).sum(axis=1).mean()
    assert cross_entropy(logits, (None, labels)).item() == pytest.approx(expected)


def test_next_token_compares_with_the_following_token() -> None:
    logits, tokens = normal(2, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [6, 5, -100, 1, 0]])
    expected = expected_cross_entropy(logits[:, :-1], tokens[:, 1:])
    assert next_token_cross_entropy(logits, {"labels": tokens}).item() == pytest.approx(expected)


def test_squared_and_binary_losses_do_not_broadcast() -> None:
    outputs, targets = normal(6, 1), normal(6, seed=1)
    expected = float(np.mean((outputs.numpy()[:, 0] - targets.numpy()) ** 2))
    assert mean_squared_error(outputs, (None, targets)).item() == pytest.approx(expected)
    assert mean_squared_error(outputs[:, 0], (None, targets[:, None])).item() == pytest.approx(expected)
    z, y = outputs.double().numpy()[:, 0], (targets > 0).numpy()
    expected = float(np.mean(np.where(y, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))))
    assert binary_cross_entropy(outputs, (None, targets > 0)).item() == pytest.approx(expected)
    for loss in (mean_squared_error, binary_cross_entropy):
        with pytest.raises(DataError, match="do not fit"):
            loss(normal(6, 2), (None, torch.zeros(6)))


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (normal(4, 3), torch.tensor([0, 1, 2, 3]), "Label 3 is no class"),
        (normal(4, 3), torch.tensor([0, 1, -1, 2]), "Label -1 is no class"),
        (normal(4, 3), torch.zeros(5, dtype=torch.long), "do not fit"),
        (normal(4, 3), torch.zeros(4), "do not fit"),
        (normal(4), torch.zeros(4, dtype=torch.long), "do not fit"),
    ],
)
def test_labels_that_do_not_fit_are_refused(logits: torch.Tensor, labels: torch.Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        cross_entropy(logits, (None, labels))


def test_binary_labels_beyond_one_are_refused() -> None:
    with pytest.raises(DataError, match="Use cross_entropy"):
        binary_cross_entropy(normal(3), (None, torch.tensor([0, 1, 2])))
