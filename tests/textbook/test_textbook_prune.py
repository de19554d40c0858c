"""Pruning as the textbook writes it, with gradients and Fisher diagonals by hand-written NumPy backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from gracile.criteria import Gradient, Hessian, Magnitude, Taylor
from gracile.data import Data
from gracile.layer_stats import LayerStats
from gracile.losses import cross_entropy
from gracile.patterns import Unstructured, unit_norms
from gracile.stats.gradients import collect_gradients

EXAMPLES = 12


def mlp_gradients(weights: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """dL_i/dW of each example i, L = −log softmax(W2 relu(W1 x + b1) + b2)[y]: [examples, *shape of W]."""
    w1, b1, w2, b2 = (weights[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    before = x @ w1.T + b1
    hidden = np.maximum(before, 0)
    logits = hidden @ w2.T + b2
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits = exp / exp.sum(axis=1, keepdims=True) - np.eye(len(b2))[y]
    d_before = (d_logits @ w2) * (before > 0)
    return {
        "0.weight": d_before[:, :, None] * x[:, None, :],
        "2.weight": d_logits[:, :, None] * hidden[:, None, :],
    }


def conv_gradients(weights: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The same of L = −log softmax(W flatten(relu(conv(x, K) + c)) + b)[y], a valid 3 × 3 convolution by loops."""
    kernel, c, w, b = (weights[name] for name in ("0.weight", "0.bias", "3.weight", "3.bias"))
    n, size = len(x), x.shape[2] - 2
    before = np.zeros((n, len(kernel), size, size))
    for i in range(3):
        for j in range(3):
            before += np.einsum("oc,nchw->nohw", kernel[:, :, i, j], x[:, :, i : i + size, j : j + size])
    before += c[:, None, None]
    hidden = np.maximum(before, 0).reshape(n, -1)
    logits = hidden @ w.T + b
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits = exp / exp.sum(axis=1, keepdims=True) - np.eye(len(b))[y]
    d_before = (d_logits @ w).reshape(before.shape) * (before > 0)
    d_kernel = np.zeros((n, *kernel.shape))
    for i in range(3):
        for j in range(3):
            d_kernel[..., i, j] = np.einsum("nohw,nchw->noc", d_before, x[:, :, i : i + size, j : j + size])
    return {"0.weight": d_kernel, "3.weight": d_logits[:, :, None] * hidden[:, None, :]}


@dataclass(frozen=True)
class Case:
    net: nn.Module
    stats: dict[str, LayerStats]
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=["mlp", "conv net"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    if request.param == "mlp":
        net, x, by_hand = (
            nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
            torch.randn(EXAMPLES, 5),
            mlp_gradients,
        )
    else:
        layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
        net, x, by_hand = nn.Sequential(*layers), torch.randn(EXAMPLES, 2, 5, 5), conv_gradients
    y = torch.randint(0, 3, (EXAMPLES,))
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    gradients = by_hand(weights, x.double().numpy(), y.numpy())
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]  # uneven batches: the mean is over examples, not over batches
    data = Data(train=batches, loss=cross_entropy)
    needs = {"gradient", "gradient_sq"}
    stats = collect_gradients(net, list(gradients), needs, data, examples=EXAMPLES)
    return Case(net, stats, weights, gradients)


def assert_scores(case: Case, criterion, expected) -> None:
    for name, per_example in case.gradients.items():
        scores = criterion(case.net.get_parameter(name), case.stats[name]).numpy()
        # float32 backpropagation against float64: a few times 1e-7, of the largest where terms cancel.
        wanted = expected(case.weights[name], per_example)
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-6 * wanted.max())
        assert wanted.max() > 0


def test_gradient(case: Case) -> None:
    assert_scores(case, Gradient(), lambda w, g: np.abs(w * g.mean(axis=0)))


def test_taylor(case: Case) -> None:
    assert_scores(case, Taylor(), lambda w, g: ((w * g) ** 2).mean(axis=0))


def test_hessian_by_the_empirical_fisher(case: Case) -> None:
    assert_scores(case, Hessian(), lambda w, g: 0.5 * w**2 * (g**2).mean(axis=0))


def test_the_fraction_removed_by_each_criterion_is_numpys(case: Case) -> None:
    """The lowest 30 % by each criterion, as NumPy sorts them: the model minus those weights is the same."""
    for criterion, expected in (
        (Magnitude(), lambda w, g: np.abs(w)),
        (Gradient(), lambda w, g: np.abs(w * g.mean(axis=0))),
        (Hessian(), lambda w, g: 0.5 * w**2 * (g**2).mean(axis=0)),
    ):
        for name, per_example in case.gradients.items():
            w = case.weights[name]
            order = np.argsort(expected(w, per_example).ravel(), kind="stable")
            keep = np.ones(w.size, bool)
            keep[order[: round(0.3 * w.size)]] = False
            weight = case.net.get_parameter(name).detach()
            mask = Unstructured().mask(criterion(weight, case.stats[name]), 0.3).numpy().ravel()
            boundary = expected(w, per_example).ravel()[order[round(0.3 * w.size) - 1 : round(0.3 * w.size) + 1]]
            if boundary[1] > boundary[0] * 1.001:  # else float32 and float64 may order the two differently
                np.testing.assert_array_equal(mask, keep)
            assert int((~mask).sum()) == round(0.3 * w.size)


def test_weights_below_a_threshold(case: Case) -> None:
    """Model − {w : |w| < ε}, strictly: a weight of exactly ε stays."""
    for name in case.gradients:
        weight = case.net.get_parameter(name).detach().clone()
        weight.view(-1)[:4] = torch.tensor([1e-3, -1e-3, 9.999e-4, 0.0])
        stays = (Magnitude()(weight, LayerStats()) >= 1e-3).numpy()
        np.testing.assert_array_equal(stays, ~(np.abs(weight.numpy()) < np.float32(1e-3)))
        assert stays.ravel()[:4].tolist() == [True, True, False, False]


def test_neurons_below_a_threshold(case: Case) -> None:
    """A neuron goes if the L2 norm of its row is below ε."""

    @dataclass(frozen=True)
    class Rows:
        tensor: str
        positions: torch.Tensor
        axis: int = 0
        role: str = "producer"

    for name in case.gradients:
        weight = case.net.get_parameter(name)
        rows = Rows(name, torch.arange(len(weight)).reshape(-1, 1))
        norms = np.sqrt((case.weights[name].reshape(len(weight), -1) ** 2).sum(axis=1))
        threshold = float(np.median(norms))
        below = unit_norms([rows], {name: weight}) < threshold
        np.testing.assert_array_equal(below.numpy(), norms < threshold)
        assert 0 < int(below.sum()) < len(weight)
