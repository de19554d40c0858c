"""Codebook: against all ways to divide few weights, against scikit-learn, and its refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from gracile.errors import ConfigError
from gracile.formats import Codebook, Int, PerTensor, bits_per_weight


def squared(weight: torch.Tensor, fmt: Codebook | Int) -> float:
    return float((fmt.decode(fmt.encode(weight)) - weight).double().square().sum())


def best_with_zero(values: list[float], levels: int) -> float:
    """The least squared error of cutting the sorted values into runs, one of which stands at zero, by trying all."""
    ordered, least = sorted(values), float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(ordered) + 1), levels - 1):
        runs = [ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))]
        errors = [sum((x - np.mean(run)) ** 2 for x in run) if run else 0.0 for run in runs]
        zero = [sum(x**2 for x in run) for run in runs]
        least = min(least, min(sum(errors) - errors[i] + zero[i] for i in range(levels)))
    return least


def test_few_weights_come_near_the_best_of_all_divisions() -> None:
    ratios = []
    for seed in range(10):
        weight = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        ratios.append(squared(weight, Codebook(2)) / best_with_zero(weight.tolist(), 4))
    assert min(ratios) >= 1 - 1e-5 and np.mean(ratios) < 1.4  # k-means ends at a local minimum


def test_many_weights_come_near_what_scikit_learn_finds() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    reference = KMeans(16, n_init=5, random_state=0).fit(weight.numpy().reshape(-1, 1)).inertia_
    assert squared(weight, Codebook(4)) < 1.05 * reference  # which has no level that must be zero
    assert squared(weight, Codebook(4)) < 0.5 * squared(weight, Int(4, PerTensor()))


def test_many_weights_that_count_differently_come_near_it_too() -> None:
    torch.manual_seed(1)
    weight, counts = torch.randn(40, 60), torch.randn(60).mul(2).exp()
    wide = counts.expand(40, 60)
    points = weight.flatten().numpy().reshape(-1, 1)
    fitted = KMeans(16, n_init=3, random_state=0).fit(points, sample_weight=wide.flatten().numpy())
    levels = Codebook(4).learn(weight, counts)
    found = float(((weight.unsqueeze(-1) - levels).square().amin(-1).double() * wide).sum())
    assert found < 1.05 * float(fitted.inertia_)  # which has no level that must be zero


def test_importance_of_columns_moves_the_levels_to_theirs() -> None:
    weight = torch.cat([torch.randn(50, 4), 0.1 * torch.randn(50, 4)], 1)
    importance = torch.tensor([1e-4] * 4 + [1.0] * 4)
    error = [
        float(((weight.unsqueeze(-1) - levels).square().amin(-1) * importance).sum())
        for levels in (Codebook(3).learn(weight), Codebook(3).learn(weight, importance))
    ]
    assert error[1] < 0.5 * error[0]


def test_levels_are_few_ascending_and_one_is_zero() -> None:
    tensors = Codebook(3).encode(torch.randn(20, 30, generator=torch.Generator().manual_seed(1)))
    assert tensors["levels"].shape == (8,) and bool((tensors["levels"].diff() > 0).all())
    assert int((tensors["levels"] == 0).sum()) == 1
    assert bits_per_weight(Codebook(3), (200, 300)) == pytest.approx(3.0, abs=0.01)


def test_given_levels_are_taken_and_the_nearest_is_found() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 4.0])
    tensors = Codebook(2).encode(torch.tensor([-3.0, -0.5, 0.2, 0.3, 2.2, 2.3]), levels)
    assert Codebook(2).decode(tensors).tolist() == [-1.0, -1.0, 0.0, 0.5, 0.5, 4.0]  # halfway to the lower one
    for bad in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0, 3.0])):
        with pytest.raises(ConfigError, match="ascending"):
            Codebook(2).encode(torch.ones(4), bad)


def test_the_nearest_of_denormal_levels_is_found() -> None:
    smallest = 2.0**-149  # of float32, in which the border between -5 and 0 of it, -2.5, would be rounded to -2
    levels = smallest * torch.tensor([-5.0, 0.0, 5.0, 10.0])
    decoded = Codebook(2).decode(Codebook(2).encode(smallest * torch.tensor([-3.0, -2.0, 3.0, 7.0]), levels))
    assert (decoded.double() / smallest).tolist() == [-5.0, 0.0, 5.0, 5.0]


@pytest.mark.parametrize("bits", [0, 9, 2.0, True])
def test_impossible_bits_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="from 1 to 8"):
        Codebook(bits)  # type: ignore[arg-type]
