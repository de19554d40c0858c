from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from gracile.allocate import GlobalRank, Level, MeasuredLoss, Uniform
from gracile.errors import ConfigError, DataError

ALLOCATIONS = [Uniform(), GlobalRank()]


def layers(*sizes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.rand(n, generator=generator) * (i + 1) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.29, 1 / 3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("sizes", [(10,), (7, 13, 100), (16, 16, 32, 64, 64), (1000, 3)])
def test_the_total_is_exact_and_one_of_each_stays(allocation, fraction: float, sizes: tuple[int, ...]) -> None:
    scores = layers(*sizes)
    removed = allocation(scores, fraction)
    assert list(removed) == list(scores)
    assert sum(removed.values()) == round(fraction * sum(sizes))
    assert all(0 <= removed[name] < scores[name].numel() for name in scores)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_where_only_one_of_each_is_left_less_is_removed(allocation) -> None:
    assert allocation(layers(2, 2, 1), 0.9) == {"layer0": 1, "layer1": 1, "layer2": 0}
    assert allocation({}, 0.5) == {}


def test_uniform_differs_from_the_fraction_by_less_than_one_each() -> None:
    removed = Uniform()(layers(7, 13, 100, 31), 0.3)
    assert removed == {"layer0": 2, "layer1": 4, "layer2": 30, "layer3": 9}  # 2.1, 3.9, 30 and 9.3


def test_global_rank_equals_one_sort_over_everything() -> None:
    scores = layers(50, 80, 20)
    owners = np.repeat([0, 1, 2], [50, 80, 20])
    order = np.argsort(np.concatenate([s.numpy() for s in scores.values()]), kind="stable")
    for fraction in (0.1, 0.3, 0.5):
        expected = np.bincount(owners[order[: round(fraction * 150)]], minlength=3)
        assert list(GlobalRank()(scores, fraction).values()) == expected.tolist()


def test_ties_go_to_the_earlier_layer() -> None:
    scores = {"a": torch.ones(4), "b": torch.ones(4)}
    assert GlobalRank()(scores, 0.5) == {"a": 3, "b": 1}  # one of a stays


def test_no_layer_loses_more_than_its_share() -> None:
    scores = {"low": torch.full((100,), 0.1), "high": torch.ones(100)}
    assert GlobalRank()(scores, 0.4) == {"low": 80, "high": 0}
    assert GlobalRank(max_fraction=0.5)(scores, 0.4) == {"low": 50, "high": 30}
    assert GlobalRank(max_fraction=0.29)(scores, 0.29) == {"low": 29, "high": 29}
    with pytest.raises(ConfigError, match="max_fraction"):
        GlobalRank(max_fraction=0.3)(scores, 0.4)


def test_scores_of_infinity_are_kept_within_the_caps() -> None:
    scores = {"a": torch.full((4,), float("inf")), "b": torch.full((4,), float("inf"))}
    assert GlobalRank(max_fraction=0.5)(scores, 0.5) == {"a": 2, "b": 2}


def test_ranking_by_score_per_cost() -> None:
    scores = {"cheap": torch.tensor([1.0, 2.0]), "dear": torch.tensor([3.0, 4.0])}
    costs = {"cheap": 1.0, "dear": 10.0}
    assert GlobalRank()(scores, 0.25, costs) == {"cheap": 1, "dear": 0}
    assert GlobalRank(per_cost=True)(scores, 0.25, costs) == {"cheap": 0, "dear": 1}
    with pytest.raises(ConfigError, match="no costs"):
        GlobalRank(per_cost=True)(scores, 0.25)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_impossible_fractions_are_refused(allocation, fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        allocation(layers(5), fraction)


def test_nan_scores_and_bad_settings_are_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        GlobalRank()({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ConfigError, match="max_fraction"):
        GlobalRank(max_fraction=0.0)


def tables(seed: int, groups: int = 4, levels: int = 4) -> dict[str, list[Level]]:
    """Losses that grow with what is removed, more and more; savings in proportion to it."""
    generator = np.random.default_rng(seed)
    found = {}
    for g in range(groups):
        losses = np.cumsum(generator.random(levels) * np.arange(1, levels + 1)) ** 2
        price = generator.integers(1, 5)
        found[f"g{g}"] = [Level(4 * (i + 1), float(losses[i]), float(4 * price * (i + 1))) for i in range(levels)]
    return found


def cost(rows: dict[str, list[Level]], removed: dict[str, int], power: float) -> tuple[float, float]:
    """Σ loss^power and Σ saved of a choice; between two levels the loss is that of the higher."""
    loss = saved = 0.0
    for name, levels in rows.items():
        if removed[name]:
            level = next(x for x in levels if x.removed >= removed[name])
            loss += level.loss**power
            saved += level.saved * removed[name] / level.removed
    return loss, saved


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_saves_what_is_asked_at_nearly_the_least_loss_of_all_choices(seed: int, power: float) -> None:
    rows = tables(seed)
    most = sum(levels[-1].saved for levels in rows.values())
    for share in (0.2, 0.5, 0.8):
        removed = MeasuredLoss(power=power).choose(rows, share * most)
        loss, saved = cost(rows, removed, power)
        assert share * most <= saved + 1e-9
        assert saved <= share * most + 4  # one unit of the dearest group too much, at most
        best = np.inf
        for levels in itertools.product(*([Level(0, 0.0, 0.0), *found] for found in rows.values())):
            if sum(level.saved for level in levels) >= share * most:
                best = min(best, sum(level.loss**power for level in levels))
        # The relaxation is exact on the convex hull only; between its corners it may pay for one level more.
        assert loss <= best + max(levels[-1].loss ** power for levels in rows.values()) / 2


def test_what_costs_nothing_goes_first_and_all_goes_where_more_is_asked() -> None:
    rows = {"free": [Level(3, 0.0, 30.0)], "dear": [Level(3, 1.0, 30.0)]}
    assert MeasuredLoss().choose(rows, 30) == {"free": 3, "dear": 0}
    assert MeasuredLoss().choose(rows, 40) == {"free": 3, "dear": 1}
    assert MeasuredLoss().choose(rows, 1e9) == {"free": 3, "dear": 3}
    assert MeasuredLoss().choose(rows, 0) == {"free": 0, "dear": 0}


@pytest.mark.parametrize(
    ("levels", "units", "expected"),
    [(4, 16, [4, 8, 12, 15]), (8, 3, [1, 2]), (2, 2, [1]), (8, 1, [])],
)
def test_widths_are_equal_steps_and_leave_a_unit(levels: int, units: int, expected: list[int]) -> None:
    assert MeasuredLoss(levels=levels).counts(units) == expected


@pytest.mark.parametrize(
    ("multiple_of", "units", "left"),
    [
        (8, 64, [56, 48, 40, 32, 24, 16, 8, 4]),
        (16, 64, [48, 32, 16, 8]),
        (8, 32, [24, 16, 8, 4]),
        (16, 16, [12, 8, 4, 2]),
        (8, 12, [10, 8, 6, 4, 2, 1]),
        (8, 3, [2, 1]),
    ],
)
def test_widths_are_multiples_that_a_group_holds_four_times_and_half_of_one(
    multiple_of: int, units: int, left: list[int]
) -> None:
    allocation = MeasuredLoss(multiple_of=multiple_of)
    assert [units - count for count in allocation.counts(units)] == left
    around = [units - count for count in allocation.counts_around(units, units - left[0], 1.0)]
    assert left[0] in around and set(around) <= {units, *left}


def test_jumps_in_what_is_saved_are_met_by_whole_widths_only() -> None:
    rows = {"a": [Level(4, 1.0, 10.0), Level(8, 3.0, 20.0)], "b": [Level(4, 2.0, 15.0)]}
    allocation = MeasuredLoss(power=1.0)
    assert allocation.choose_levels(rows, 12.0) == {"a": 0, "b": 4}
    assert allocation.choose_levels(rows, 22.0) == {"a": 4, "b": 4}
    assert allocation.choose_levels(rows, 30.0) == {"a": 8, "b": 4}
    context = {"a": [Level(4, 1.0, 10.0, in_context=True)], "b": rows["b"]}
    assert allocation.choose_levels(context, 0.0) == {"a": 4, "b": 0}


@pytest.mark.parametrize(
    "settings", [{"power": 0}, {"power": 3}, {"levels": 1}, {"examples": 0}, {"multiple_of": 0}], ids=str
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MeasuredLoss(**settings)  # type: ignore[arg-type]


def test_widths_around_the_present_one_stay_within_reach_and_within_the_group() -> None:
    allocation = MeasuredLoss(levels=8, reach=0.25)
    assert allocation.counts_around(32, 16, 1.0) == [8, 12, 16, 20, 24]
    assert allocation.counts_around(32, 16, 0.5) == [12, 14, 16, 18, 20]
    assert allocation.counts_around(32, 0, 1.0) == [0, 4, 8]
    assert allocation.counts_around(8, 7, 1.0) == [5, 6, 7]
    assert allocation.counts_around(3, 1, 0.1) == [0, 1, 2]
    # The present one is no multiple: budgets that do not jump are met between widths.
    assert MeasuredLoss(multiple_of=8).counts_around(32, 13, 1.0) == [8, 13, 16, 24]


def test_in_context_staying_whole_is_an_option_only_where_it_was_measured() -> None:
    around = [Level(4, 0.5, 40.0, in_context=True), Level(6, 0.9, 60.0, in_context=True)]
    whole = [Level(0, 0.6, 0.0, in_context=True), Level(2, 0.7, 20.0, in_context=True)]
    chosen = MeasuredLoss(power=1.0).choose({"a": around, "b": whole}, 40.0)
    assert chosen == {"a": 4, "b": 0}
    assert MeasuredLoss(power=1.0).choose({"a": around, "b": whole}, 60.0) == {"a": 4, "b": 2}


@pytest.mark.parametrize("settings", [{"rounds": -1}, {"rounds": 1.5}, {"reach": 0}, {"reach": 1.5}])
def test_impossible_rounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        MeasuredLoss(**settings)
