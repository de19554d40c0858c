"""SignRound: against all roundings of small layers, its steps written out, and what it never does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.solvers import GPTQ, SignRound
from gracile.solvers.sign_round import HardChoice
from tests.solvers.rounding_problems import UniformGrid, layer, least_losses


@pytest.mark.parametrize(("bits", "width"), [(2, 7), (3, 6)])
def test_it_is_no_worse_than_its_start_and_near_the_best(bits: int, width: int) -> None:
    ratios = []
    for seed in range(6):
        weight, problem = layer(seed, 4, width)
        grid = UniformGrid(bits)
        found = SignRound()(weight, problem, grid)
        assert bool((found.loss <= GPTQ()(weight, problem, grid).loss * (1 + 1e-9)).all())
        ratios.append(float(found.loss.sum() / least_losses(problem, found.scale[:, 0], grid).sum()))
    assert np.mean(ratios) < 1.03


def test_from_nearest_it_gains_much_of_what_rounding_leaves() -> None:
    gains = []
    for seed in range(4):
        weight, problem = layer(seed, 6, 24)
        found = SignRound(iterations=400, start=None)(weight, problem, UniformGrid(3))
        gains.append(float(found.loss.sum() / found.nearest_loss.sum()))
        assert bool(((found.weight - weight).abs() <= found.scale * (1 + 1e-9)).all())
    assert np.mean(gains) < 0.7


def test_a_choice_is_always_on_the_grid_and_passes_gradients() -> None:
    a, b = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([2.0, 0.0, 2.0])
    choice = HardChoice(a, b, torch.tensor([1.3, 0.2, 5.0]))
    assert choice.variable.tolist() == pytest.approx([0.3, 0.5, 0.5])  # a is what the start chose, also if b is nearer
    assert choice.weight().tolist() == choice.rounded().tolist() == [1.0, 1.0, 2.0]
    choice.weight().sum().backward()
    assert choice.variable.grad is not None and choice.variable.grad.tolist() == [1.0, -1.0, 0.0]
    choice.variable.data += 0.3
    assert choice.weight().tolist() == choice.rounded().tolist() == [2.0, 0.0, 2.0]


def test_steps_have_the_length_of_the_rate_whatever_the_gradient() -> None:
    solver = SignRound(learning_rate=0.1)
    choice = HardChoice(torch.zeros(4), torch.ones(4), torch.tensor([0.3, 0.3, 0.05, 0.3]))
    scale = torch.zeros((), requires_grad=True)
    optimizer = solver.optimizer([choice], [scale])
    choice.variable.grad = torch.tensor([1e-6, -50.0, 3.0, 0.0])
    scale.grad = torch.tensor(7.0)
    solver.update(optimizer, progress=0.5)
    assert choice.variable.tolist() == pytest.approx([0.25, 0.35, 0.0, 0.3])
    assert scale.item() == pytest.approx(-0.005)


def test_impossible_settings_are_refused() -> None:
    for settings in ({"iterations": 0}, {"learning_rate": 0.0}, {"drop": 1.0}, {"start": "GPTQ"}):
        with pytest.raises(ConfigError, match="SignRound"):
            SignRound(**settings)  # type: ignore[arg-type]
