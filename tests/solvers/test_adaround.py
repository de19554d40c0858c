"""AdaRound: against all roundings of small layers, its choice between two grid points, and its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError
from gracile.solvers import GPTQ, AdaRound
from gracile.solvers.adaround import SoftChoice
from tests.solvers.rounding_problems import UniformGrid, layer, least_losses


@pytest.mark.parametrize(("bits", "width"), [(2, 7), (3, 6), (4, 5)])
def test_it_comes_near_the_best_of_all_roundings(bits: int, width: int) -> None:
    ratios = []
    for seed in range(6):
        weight, problem = layer(seed, 4, width)
        grid = UniformGrid(bits)
        found = AdaRound(iterations=300)(weight, problem, grid)
        best = least_losses(problem, found.scale[:, 0], grid)
        assert bool((found.loss >= best * (1 - 1e-9)).all())
        ratios.append(float(found.loss.sum() / best.sum()))
    assert np.mean(ratios) < 1.03


def test_from_nearest_it_gains_what_its_relaxation_can() -> None:
    """Without the closed form: codes one off the nearest only, so behind the best of all, but far before nearest."""
    gains = []
    for seed in range(4):
        weight, problem = layer(seed, 6, 24)
        found = AdaRound(iterations=500, start=None)(weight, problem, UniformGrid(3))
        gains.append(float(found.loss.sum() / found.nearest_loss.sum()))
        assert bool(((found.weight - weight).abs() <= found.scale * (1 + 1e-9)).all())
    assert np.mean(gains) < 0.6


def test_a_choice_starts_at_the_weight_and_ends_on_a_grid_point() -> None:
    a, b = torch.tensor([1.0, 1.0, -1.0, 2.0]), torch.tensor([2.0, 2.0, -2.0, 2.0])
    wanted = torch.tensor([1.3, 1.9, -1.0, 5.0])
    choice = SoftChoice(a, b, wanted)
    # In between as the weight is; never beyond the middle nor quite at an end; nothing to choose at the grid's end.
    assert choice.weight().tolist() == pytest.approx([1.3, 1.45, -1.1, 2.0])
    assert choice.rounded().tolist() == a.tolist()
    choice.variable.data += torch.tensor([10.0, -10.0, 10.0, 10.0])
    assert choice.rounded().tolist() == [2.0, 1.0, -2.0, 2.0]
    assert choice.weight().tolist() == [2.0, 1.0, -2.0, 2.0]


def test_the_pull_grows_and_vanishes_where_all_is_decided() -> None:
    choice = SoftChoice(torch.zeros(3), torch.ones(3), torch.tensor([0.2, 0.3, 0.45]))
    assert float(choice.undecided(0.1)) == 0.0
    h = choice.share().detach().numpy()
    for progress, exponent in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        expected = np.mean(1 - np.abs(2 * h - 1) ** exponent)
        assert float(choice.undecided(progress).detach()) == pytest.approx(float(expected), rel=1e-5)
    choice.variable.data += 20
    assert float(choice.undecided(0.9).detach()) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "positive"),
        ({"strength": -1.0}, "positive"),
        ({"drop": 1.0}, "probability"),
        ({"start": "GPTQ"}, "expected solvers.GPTQ"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaRound(**settings)  # type: ignore[arg-type]


def test_targets_are_those_of_its_start() -> None:
    assert AdaRound(start=GPTQ(asymmetry=1.0, damping=0.1)).asymmetry == 1.0
    assert AdaRound(start=GPTQ(asymmetry=1.0, damping=0.1)).damping == 0.1
    assert AdaRound(start=None).asymmetry == GPTQ().asymmetry
