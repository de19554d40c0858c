"""Spatial low rank: against the singular value decomposition, a general minimiser, and its promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from gracile.errors import ConfigError, DataError
from gracile.solvers import LowRank, Moments, SpatialLowRank
from gracile.solvers.low_rank import squared_error, symmetric
from gracile.solvers.spatial_low_rank import left_out

KERNEL = (3, 2)
CHANNELS, OUTPUTS = 2, 4
#: A ridge so small that it changes nothing that these tests can see.
NONE = 1e-10


def case(seed: int) -> tuple[Tensor, Moments]:
    """A weight [out, c·i·j] and moments of correlated inputs that are not centred, with other targets than it gives."""
    generator = torch.Generator().manual_seed(seed)
    d = CHANNELS * KERNEL[0] * KERNEL[1]
    weight, other = (torch.randn(OUTPUTS, d, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(300, d, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=generator, dtype=torch.float64) + 0.5
    t = x @ (weight + 0.1 * other).T + 1.0
    n = len(x)
    return weight, Moments(x.T @ x / n, t.T @ x / n, x.mean(0), t.mean(0), t.square().mean(0))


def assemble(first: np.ndarray, second: np.ndarray, transposed: bool) -> np.ndarray:
    """[out, c·rows·columns] by loops over the definition."""
    i, j = KERNEL[::-1] if transposed else KERNEL
    rank = len(first)
    c, b = first.reshape(rank, CHANNELS, i), second.reshape(OUTPUTS, rank, j)
    weight = np.zeros((OUTPUTS, CHANNELS, *KERNEL))
    for row in range(KERNEL[0]):
        for column in range(KERNEL[1]):
            at, across = (column, row) if transposed else (row, column)
            weight[:, :, row, column] = b[:, :, across] @ c[:, :, at]
    return weight.reshape(OUTPUTS, -1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_product_is_what_both_factors_make(rank: int, transposed: bool) -> None:
    weight, moments = case(0)
    factors = SpatialLowRank()(weight, moments, True, KERNEL, transposed).factors(rank)
    made = assemble(factors.first.numpy(), factors.second.numpy(), transposed)
    assert np.abs(factors.product.numpy() - made).max() < 1e-12
    assert torch.allclose(factors.shift, moments.mean_target - factors.product @ moments.mean)


@pytest.mark.parametrize("transposed", [False, True])
def test_of_a_weight_on_white_inputs_the_start_is_its_singular_value_decomposition(transposed: bool) -> None:
    weight, _ = case(1)
    d = weight.shape[1]
    moments = symmetric(weight, torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
    product = SpatialLowRank(NONE, sweeps=0)(weight, moments, False, KERNEL, transposed).factors(2).product.numpy()
    dims = weight.numpy().reshape(OUTPUTS, CHANNELS, *KERNEL)
    dims = dims.swapaxes(2, 3) if transposed else dims
    matrix = dims.transpose(1, 2, 0, 3).reshape(CHANNELS * dims.shape[2], -1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    wanted = ((u[:, :2] * s[:2]) @ v[:2]).reshape(CHANNELS, dims.shape[2], OUTPUTS, -1).transpose(2, 0, 1, 3)
    wanted = (wanted.swapaxes(2, 3) if transposed else wanted).reshape(OUTPUTS, -1)
    assert np.abs(product - wanted).max() < 1e-7  # the ridge
    assert left_out(weight.unflatten(1, (CHANNELS, *KERNEL)), 2, transposed) == pytest.approx(float((s[2:] ** 2).sum()))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_of_this_form_is_found(transposed: bool) -> None:
    generator = np.random.default_rng(0)
    i, j = KERNEL[::-1] if transposed else KERNEL
    first, second = generator.normal(size=(2, CHANNELS * i)), generator.normal(size=(OUTPUTS, 2 * j))
    weight = torch.from_numpy(assemble(first, second, transposed))
    _, moments = case(2)
    moments = symmetric(weight, moments.gram, moments.mean)
    factors = SpatialLowRank(NONE)(weight, moments, True, KERNEL, transposed).factors(2)
    assert float((factors.product - weight).norm() / weight.norm()) < 1e-5


def test_sweeps_end_in_a_minimum_and_mostly_in_the_best_that_a_general_minimiser_finds() -> None:
    ratios = []
    for seed, transposed in itertools.product(range(6), (False, True)):
        weight, moments = case(seed)
        rank, i = 2, KERNEL[1] if transposed else KERNEL[0]
        split = rank * CHANNELS * i
        size = split + OUTPUTS * rank * (KERNEL[0] * KERNEL[1] // i)

        def objective(
            v: np.ndarray, split: int = split, moments: Moments = moments, transposed: bool = transposed
        ) -> float:
            product = torch.from_numpy(assemble(v[:split].reshape(2, -1), v[split:], transposed))
            return squared_error(product, moments.mean_target - product @ moments.mean, moments)

        generator = np.random.default_rng(seed)
        found = [float(minimize(objective, generator.normal(size=size), method="BFGS").fun) for _ in range(4)]
        errors = []
        for sweeps in (0, 2, 50):
            factors = SpatialLowRank(NONE, sweeps)(weight, moments, True, KERNEL, transposed).factors(rank)
            errors.append(squared_error(factors.product, factors.shift, moments))
        assert errors[0] >= errors[1] >= errors[2] * (1 - 1e-9)
        ratios.append(errors[2] / min(found))
    # the inputs are far from white, and each case has several minima that differ by up to 2
    assert sum(ratio < 1.01 for ratio in ratios) >= 8 and max(ratios) < 2


def test_at_equal_cost_it_is_nearer_to_smooth_filters_than_low_rank_behind_the_whole_kernel() -> None:
    grid = torch.linspace(-1, 1, 5, dtype=torch.float64)
    bumps = [torch.exp(-(((grid - a) / w) ** 2)) for a in (-0.5, 0.0, 0.5) for w in (0.5, 1.0)]
    generator = torch.Generator().manual_seed(0)
    mixes = torch.randint(0, 6, (2, 8, 8), generator=generator)
    weight = torch.stack([torch.stack([torch.outer(bumps[a], bumps[b]) for a, b in zip(*row)]) for row in zip(*mixes)])
    prior, d = weight.flatten(1), 8 * 25
    moments = symmetric(prior, torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
    spatial = SpatialLowRank()(prior, moments, False, (5, 5)).factors(10)  # 10 · (8·5 + 8·5) weights
    whole = LowRank()(prior, moments, False).factors(3)  # 3 · (8·25 + 8)
    assert float((spatial.product - prior).norm()) < 0.5 * float((whole.product - prior).norm())


def test_equal_and_dead_inputs_give_finite_factors() -> None:
    weight, moments = case(3)
    gram = moments.gram.clone()
    gram[1], gram[:, 1] = gram[0], gram[:, 0]  # two inputs are one
    gram[2], gram[:, 2] = 0, 0
    broken = symmetric(weight, gram, torch.zeros_like(moments.mean))
    for rank in (1, 4, 6):
        factors = SpatialLowRank()(weight, broken, False, KERNEL).factors(rank)
        assert all(bool(torch.isfinite(t).all()) for t in (factors.first, factors.second, factors.shift))
        assert squared_error(factors.product, factors.shift, broken) <= squared_error(0 * weight, factors.shift, broken)


def test_what_it_refuses() -> None:
    weight, moments = case(0)
    moments.gram[0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        SpatialLowRank()(weight, moments, True, KERNEL)
    for settings in ({"damping": 0.0}, {"sweeps": -1}, {"steps": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            SpatialLowRank(**settings)  # type: ignore[arg-type]
