"""OBS: closed forms against brute-force least squares, and greedy removal against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from gracile.criteria import OBS, Consumer, Units
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats

TINY = 1e-12  # damping so small that the closed form is plain least squares


def layer(seed: int, out: int = 5, units: int = 6, k: int = 2, n: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [out, d], inputs [n, d] whose columns are correlated, and the columns of each unit."""
    generator = torch.Generator().manual_seed(seed)
    d = units * k
    mixing = torch.eye(d, dtype=torch.float64) + torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(out, d, generator=generator, dtype=torch.float64)
    return weight, inputs, torch.randperm(d, generator=generator).reshape(units, k)


def gram(inputs: Tensor) -> Tensor:
    return 2 * inputs.T @ inputs / len(inputs)


def consumer(weight: Tensor, moments: Tensor, columns: Tensor) -> Consumer:
    return Consumer("layer", weight, moments, torch.zeros(len(moments)), columns)


def least_error(weight: Tensor, inputs: Tensor, gone: Tensor) -> float:
    """(1/N) ‖(V − W) x‖² of the best V without these columns, by NumPy."""
    left = [j for j in range(inputs.shape[1]) if j not in gone.tolist()]
    target = (inputs @ weight.T).numpy()
    solved = np.linalg.lstsq(inputs[:, left].numpy(), target, rcond=None)[0]
    return float(((inputs[:, left].numpy() @ solved - target) ** 2).sum() / len(inputs))


def test_the_score_of_a_single_weight_is_the_brute_force_increase_of_its_rows_error() -> None:
    weight, inputs, _ = layer(0, out=2, units=4, k=1)
    scores = OBS(damping=TINY)(weight, LayerStats(gram=gram(inputs)[None]))
    for row, column in itertools.product(range(2), range(4)):
        brute = least_error(weight[row : row + 1], inputs, torch.tensor([column]))
        assert float(scores[row, column]) == pytest.approx(brute, rel=1e-6)  # scores are float32


def test_each_group_of_a_convolution_has_its_own_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 2, 3, 3, generator=generator)
    grams = torch.stack([gram(torch.randn(100, 18, generator=generator, dtype=torch.float64)) for _ in range(2)])
    scores = OBS()(weight, LayerStats(gram=grams))
    for g in range(2):
        alone = OBS()(weight[2 * g : 2 * g + 2], LayerStats(gram=grams[g : g + 1]))
        assert torch.equal(scores[2 * g : 2 * g + 2], alone)


def test_the_first_unit_to_go_costs_what_brute_force_says() -> None:
    weight, inputs, columns = layer(2)
    found = OBS(damping=TINY).unit_scores(Units(consumers=(consumer(weight, gram(inputs), columns),)))
    energy = float((inputs @ weight.T).square().sum() / len(inputs))
    brute = [least_error(weight, inputs, unit) / energy for unit in columns]
    first = int(found.argmin())
    assert first == int(np.argmin(brute))
    assert float(found[first]) == pytest.approx(brute[first], rel=1e-6)


def test_costs_of_all_that_went_add_up_to_the_error_without_them() -> None:
    """After t removals with updates, the sum of what each cost is the least-squares error on the columns left."""
    weight, inputs, columns = layer(3)
    scores = OBS(damping=TINY).unit_scores(Units(consumers=(consumer(weight, gram(inputs), columns),)))
    energy = float((inputs @ weight.T).square().sum() / len(inputs))
    order = scores.argsort(stable=True)
    assert bool((scores[order].diff() > 0).all()), "each cost more than the one before, so none was raised to it"
    for count in (1, 2, 4):
        brute = least_error(weight, inputs, columns[order[:count]].flatten()) / energy
        assert float(scores[order[:count]].sum()) == pytest.approx(brute, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_is_near_the_best_of_all_subsets(count: int) -> None:
    excess = []
    for seed in range(12):
        weight, inputs, columns = layer(seed, units=7)
        scores = OBS(damping=TINY).unit_scores(Units(consumers=(consumer(weight, gram(inputs), columns),)))
        greedy = least_error(weight, inputs, columns[scores.argsort()[:count]].flatten())
        subsets = itertools.combinations(range(7), count)
        best = min(least_error(weight, inputs, columns[list(s)].flatten()) for s in subsets)
        excess.append(greedy / best - 1)
    assert min(excess) >= -1e-9
    assert np.mean(excess) < 0.02


def test_consumers_count_by_their_own_energy() -> None:
    weight, inputs, columns = layer(4)
    one = consumer(weight, gram(inputs), columns)
    louder = consumer(1000 * weight, gram(inputs), columns)
    quiet = OBS().unit_scores(Units(consumers=(one,)))
    torch.testing.assert_close(OBS().unit_scores(Units(consumers=(louder,))), quiet, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        OBS().unit_scores(
            Units(
                consumers=(
                    one,
                    louder,
                )
            )
        ),
        2 * quiet,
        rtol=1e-9,
        atol=0,
    )


def test_units_that_nothing_reads_and_dead_inputs_are_free() -> None:
    weight, inputs, columns = layer(5)
    weight[:, columns[2]] = 0
    inputs[:, columns[4]] = 0
    scores = OBS().unit_scores(Units(consumers=(consumer(weight, gram(inputs), columns),)))
    assert set(scores.argsort()[:2].tolist()) == {2, 4}
    silent = OBS().unit_scores(Units(consumers=(consumer(weight, torch.zeros_like(gram(inputs)), columns),)))
    assert torch.isfinite(silent).all()


def test_nothing_given_is_changed() -> None:
    weight, inputs, columns = layer(6)
    given = consumer(weight.clone(), gram(inputs), columns)
    OBS().unit_scores(Units(consumers=(given,)))
    assert torch.equal(given.weight, weight) and torch.equal(given.gram, gram(inputs))


@pytest.mark.parametrize("sweeps", [-1, 1.5])
def test_an_impossible_number_of_sweeps_is_refused(sweeps: float) -> None:
    with pytest.raises(ConfigError, match="swap_sweeps"):
        OBS(swap_sweeps=sweeps)  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [0, -1, float("inf"), float("nan")])
def test_an_impossible_damping_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="damping"):
        OBS(damping=damping)


def test_many_units_go_in_rounds_with_updates_between() -> None:
    weight, inputs, columns = layer(7, units=10, k=1)
    reader = consumer(weight, gram(inputs), columns)
    rounds = OBS(damping=TINY, rounds=5).unit_scores(Units(consumers=(reader,)))
    order = columns.flatten()[rounds.argsort()]
    energy = float(((inputs @ weight.T) ** 2).sum() / len(inputs))
    for first in range(0, 10, 2):  # two together, each at its cost alone once those before are gone
        gone = order[:first]
        before = least_error(weight, inputs, gone)
        alone = [
            (least_error(weight, inputs, torch.cat([gone, unit[None]])) - before) / energy for unit in order[first:]
        ]
        cheapest = sorted(alone)[:2]
        assert alone[:2] == pytest.approx(cheapest)


def test_one_round_ranks_by_the_cost_alone() -> None:
    weight, inputs, columns = layer(8, units=6, k=2)
    reader = consumer(weight, gram(inputs), columns)
    ranked = OBS(damping=TINY, rounds=1, swap_sweeps=0).unit_scores(Units(consumers=(reader,))).argsort().tolist()
    alone = [least_error(weight, inputs, unit) for unit in columns]
    assert ranked == sorted(range(6), key=lambda unit: alone[unit])
