from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.criteria import Gradient, Hessian, Magnitude, Random, Taylor
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats

W = torch.tensor([[1.0, -2.0], [0.5, 0.0]])


def test_scores_by_hand() -> None:
    stats = LayerStats(
        gradient=torch.tensor([[0.1, 0.2], [-4.0, 9.0]]),
        gradient_sq=torch.tensor([[0.5, 0.25], [8.0, 100.0]]),
        hessian_diagonal=torch.tensor([[3.0, -1.0], [2.0, 5.0]]),
    )
    assert Magnitude()(W, stats).tolist() == [[1, 2], [0.5, 0]]
    assert Magnitude(power=2)(W, stats).tolist() == [[1, 4], [0.25, 0]]
    np.testing.assert_allclose(Gradient()(W, stats), [[0.1, 0.4], [2.0, 0]], rtol=1e-6)
    assert Taylor()(W, stats).tolist() == [[0.5, 1.0], [2.0, 0]]
    assert Hessian()(W, stats).tolist() == [[0.25, 0.5], [1.0, 0]]
    # Negative curvature counts as 0.
    assert Hessian(hutchinson_probes=1)(W, stats).tolist() == [[1.5, 0.0], [0.25, 0]]


def test_the_hessian_score_is_the_loss_of_removing_one_weight_of_a_quadratic() -> None:
    """L(w) = ½ Σ h_i (w_i − w*_i)² at its minimum: setting w_i to 0 raises it by exactly the score."""
    h = torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    scores = Hessian(hutchinson_probes=1)(W, LayerStats(hessian_diagonal=h))
    for i in range(2):
        for j in range(2):
            without = W.clone()
            without[i, j] = 0
            assert scores[i, j].item() == pytest.approx(0.5 * float((h * (without - W) ** 2).sum()))


def test_random_differs_by_seed_and_by_weight_and_is_uniform() -> None:
    weight = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    scores = Random(0)(weight, LayerStats())
    assert not torch.equal(scores, Random(1)(weight, LayerStats()))
    assert not torch.equal(scores, Random(0)(weight + 1, LayerStats()))
    # Of 20,000 uniform numbers the largest deviation of the empirical distribution is below 0.0138 with 99.9 %.
    ordered = np.sort(scores.flatten().numpy())
    assert np.abs(ordered - np.arange(1, 20001) / 20000).max() < 0.0138


@pytest.mark.parametrize("bad", [lambda: Magnitude(power=0), lambda: Magnitude(power=-1), lambda: Hessian(0)])
def test_impossible_settings_are_refused(bad) -> None:
    with pytest.raises(ConfigError):
        bad()
