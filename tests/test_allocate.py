from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.allocate import GlobalRank, Uniform
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
