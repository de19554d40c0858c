"""The last factors fitted to the original's probabilities: by SciPy, and left alone where they must be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from gracile.data import Data
from gracile.stats.fit_outputs import fit_last_factors
from gracile.stats.match import divergence


class Classifier(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.body(x)))
        return out


def pair(classes: int = 5) -> tuple[nn.Module, Classifier, list[Tensor]]:
    torch.manual_seed(0)
    original = Classifier(classes).eval()
    with torch.no_grad():
        original.head.weight.mul_(4)
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.body.weight.add_(0.4 * torch.randn(6, 4))
    return original, model, [torch.randn(40, 4) for _ in range(9)]


def test_the_factors_are_the_minimum_that_scipy_finds() -> None:
    original, model, batches = pair()
    inputs = torch.cat([batch for i, batch in enumerate(batches) if i % 8])
    hidden = model.body(inputs).detach().double().numpy()
    n = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    head, offset = (p.detach().double().numpy() for p in (model.head.weight, model.head.bias))
    target = original(inputs).detach().double().softmax(1).numpy()

    def loss(theta: np.ndarray) -> float:
        logits = (n * theta[:6] + theta[6:]) @ head.T + offset
        logits = logits - logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(target * logs).sum(1).mean())

    before = copy.deepcopy(model.state_dict())
    found = fit_last_factors(model, original, "norm", Data(calibration=batches))
    assert found is not None and found[1] < found[0]
    best = minimize(loss, np.concatenate([np.ones(6), np.zeros(6)]), method="BFGS").fun
    here = loss(np.concatenate([model.norm.weight.detach().numpy(), model.norm.bias.detach().numpy()]))
    assert here == pytest.approx(best, rel=2e-3)  # twenty steps from a start near by
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["norm.weight", "norm.bias"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    held_out = [batches[0], batches[8]]
    outputs, expected = ([net(batch).detach() for batch in held_out] for net in (model, original))
    assert found[1] == pytest.approx(divergence(outputs, expected), rel=1e-4)


class Same(nn.Module):
    """Another net on most batches, and on some the model as it is, which every change then harms."""

    def __init__(self, original: nn.Module, model: nn.Module, there: list[Tensor]) -> None:
        super().__init__()
        self.original, self.model, self.there = original, copy.deepcopy(model), there

    def forward(self, x: Tensor) -> Tensor:
        same = any(torch.equal(x, each) for each in self.there)
        out: Tensor = self.model(x) if same else self.original(x)
        return out


def test_what_fits_the_fitted_batches_alone_is_taken_back() -> None:
    original, model, batches = pair()
    before = copy.deepcopy(model.state_dict())
    found = fit_last_factors(model, Same(original, model, [batches[0], batches[8]]), "norm", Data(calibration=batches))
    assert found == (0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_that_are_no_scores_of_classes_are_left_alone() -> None:
    original, model, batches = pair(classes=1)
    before = copy.deepcopy(model.state_dict())
    assert fit_last_factors(model, original, "norm", Data(calibration=batches)) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_that_are_not_affine_in_the_factors_are_left_alone() -> None:
    original, model, batches = pair()
    for net in (original, model):
        net.head = nn.Sequential(nn.Tanh(), net.head)  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    assert fit_last_factors(model, original, "norm", Data(calibration=batches)) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
