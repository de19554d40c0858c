"""Swap search: its costs against least squares by NumPy, and its sets against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from gracile.criteria import OBS, Consumer, Units
from gracile.criteria.exchange import Reader, exchange

TINY = 1e-12  # damping so small that the closed form is plain least squares
UNITS = 8


def layer(seed: int, k: int, spare: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [5, d], correlated inputs [300, d], columns [8, k]; the last `spare` columns belong to no unit."""
    generator = torch.Generator().manual_seed(seed)
    d = UNITS * k + spare
    mixing = torch.eye(d, dtype=torch.float64) + torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    inputs = torch.randn(300, d, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, d, generator=generator, dtype=torch.float64)
    return weight, inputs, torch.randperm(UNITS * k, generator=generator).reshape(UNITS, k)


def consumer(weight: Tensor, inputs: Tensor, columns: Tensor) -> Consumer:
    return Consumer("layer", weight, 2 * inputs.T @ inputs / len(inputs), inputs.mean(0), columns)


def least_cost(layers: list[tuple[Tensor, Tensor, Tensor]], kept: list[int]) -> float:
    """Σ ‖(V − W) x‖² / ‖W x‖² with the best V on the columns that are left, by NumPy."""
    total = 0.0
    for weight, inputs, columns in layers:
        gone = set(columns[[u for u in range(UNITS) if u not in kept]].flatten().tolist())
        left = [j for j in range(inputs.shape[1]) if j not in gone]
        target = (inputs @ weight.T).numpy()
        rest = inputs[:, left].numpy()
        solved = np.linalg.lstsq(rest, target, rcond=None)[0]
        total += float(((rest @ solved - target) ** 2).sum() / (target**2).sum())
    return total


def reader(weight: Tensor, inputs: Tensor, columns: Tensor) -> Reader:
    gram = 2 * inputs.T @ inputs / len(inputs)
    return Reader(gram, weight, columns, 0.5 * float(((weight @ gram) * weight).sum()))


@pytest.mark.parametrize(("k", "spare"), [(1, 0), (2, 3)])
def test_every_change_it_weighs_is_the_brute_force_change(k: int, spare: int) -> None:
    case = layer(0, k, spare)
    state = reader(*case)
    state.restrict([1, 4, 6])
    kept = [0, 2, 3, 5, 7]
    before = least_cost([case], kept)
    assert state.cost() == pytest.approx(before, rel=1e-8)
    state.border(4)
    changes = state.costs(torch.tensor(kept)) - state.gain
    for change, other in zip(changes.tolist(), kept):
        after = least_cost([case], sorted(set(kept) - {other} | {4}))
        assert before + change == pytest.approx(after, rel=1e-8)
    state.swap(4, 3)
    assert state.cost() == pytest.approx(least_cost([case], [0, 2, 4, 5, 7]), rel=1e-8)
    state.border(3)  # and the state goes on being right
    assert state.cost() - state.gain == pytest.approx(least_cost([case], [0, 2, 3, 4, 5, 7]), rel=1e-7)


def test_it_never_gets_worse_and_ends_where_no_single_exchange_helps() -> None:
    for seed in range(6):
        case = layer(seed, 2)
        start = [0, 1, 2, 3]
        cost, kept = exchange([reader(*case)], start, sweeps=20)
        assert cost == pytest.approx(least_cost([case], kept), rel=1e-7)
        assert cost <= least_cost([case], start) * (1 + 1e-9) and len(kept) == 4
        for unit, other in itertools.product(kept, set(range(UNITS)) - set(kept)):
            assert cost <= least_cost([case], sorted(set(kept) - {unit} | {other})) * (1 + 1e-7)


@pytest.mark.parametrize("readers", [1, 2])
def test_sets_are_within_a_hundredth_of_the_best_of_all(readers: int) -> None:
    excess, greedy_excess = [], []
    for seed, count in itertools.product(range(30), (3, 4, 5, 6)):
        layers = [layer(seed + 100 * i, 2 - i) for i in range(readers)]
        units = Units(consumers=tuple(consumer(*case) for case in layers))
        criterion = OBS(damping=TINY)
        greedy = sorted(criterion.unit_scores(units).argsort(descending=True)[:count].tolist())
        found = criterion.choose(units, greedy)
        assert found == sorted(set(found)) and len(found) == count
        best = min(least_cost(layers, list(kept)) for kept in itertools.combinations(range(UNITS), count))
        excess.append(least_cost(layers, found) / best - 1)
        greedy_excess.append(least_cost(layers, greedy) / best - 1)
    assert min(excess) > -1e-9
    assert all(mine <= theirs + 1e-9 for mine, theirs in zip(excess, greedy_excess))
    assert np.mean(excess) < 0.01 < np.mean(greedy_excess)


def test_no_sweeps_leave_the_units_that_scores_chose() -> None:
    units = Units(consumers=(consumer(*layer(0, 1)),))
    assert OBS(swap_sweeps=0).choose(units, [5, 1]) == [1, 5]


@pytest.mark.parametrize("kept", [[3], list(range(UNITS - 1))])
def test_one_unit_in_or_out_is_found_exactly(kept: list[int]) -> None:
    case = layer(3, 2)
    found = OBS(damping=TINY).choose(Units(consumers=(consumer(*case),)), kept)
    best = min(itertools.combinations(range(UNITS), len(kept)), key=lambda s: least_cost([case], list(s)))
    assert found == list(best)


def test_dead_inputs_do_not_disturb_it() -> None:
    weight, inputs, columns = layer(4, 2)
    inputs[:, columns[[1, 5]].flatten()] = 0
    found = OBS().choose(Units(consumers=(consumer(weight, inputs, columns),)), [0, 1, 2, 3, 4, 5])
    assert not {1, 5} & set(found)
