from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from gracile.errors import ConfigError, DataError
from gracile.patterns import NM, Channels, Unstructured, lowest, mean_normalised, reduce_scores, unit_norms


@dataclass(frozen=True)
class Tied:
    tensor: str
    axis: int
    positions: Tensor
    role: str = "producer"


def test_lowest_by_hand_breaks_ties_by_index() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 5.0]])
    assert lowest(scores, 2).tolist() == [[False, True, False], [True, False, False]]
    assert lowest(scores, 4).tolist() == [[False, True, True], [True, True, False]]
    assert not lowest(scores, 0).any()
    assert lowest(scores, 6).all()


@pytest.mark.parametrize("seed", range(5))
def test_lowest_equals_a_stable_numpy_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (101,), generator=generator).float()
    for count in (1, 17, 50, 100):
        expected = np.zeros(101, bool)
        expected[np.argsort(scores.numpy(), kind="stable")[:count]] = True
        assert lowest(scores, count).tolist() == expected.tolist()


def test_nm_groups_are_consecutive_in_the_flattened_row() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5]]).reshape(1, 2, 2, 2)
    assert NM(2, 4).mask(scores).flatten().tolist() == [False, False, True, True, True, True, False, False]
    assert NM(2, 4).sparsity == 0.5


@pytest.mark.parametrize("shape", [(4, 10), (8,), (2, 3, 3, 3)])
def test_rows_that_groups_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="groups of 4 divide"):
        NM(2, 4).mask(torch.rand(shape))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: NM(4, 4),
        lambda: NM(0, 4),
        lambda: NM(2, 4).mask(torch.rand(2, 4), 0.3),
        lambda: Unstructured().mask(torch.rand(3), 1.2),
        lambda: Unstructured().mask(torch.rand(3), float("nan")),
        lambda: Channels(multiple_of=0),
    ],
)
def test_impossible_amounts_are_refused(bad) -> None:
    with pytest.raises(ConfigError):
        bad()


def test_unit_norms_are_norms_of_the_producing_rows() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    members = [
        Tied("a.weight", 0, torch.arange(6).reshape(6, 1)),
        Tied("b.weight", 1, torch.arange(6).reshape(6, 1), "consumer"),
    ]
    norms = unit_norms(members, {"a.weight": weight, "b.weight": torch.full((2, 6), 1e6)})
    np.testing.assert_allclose(norms, np.linalg.norm(weight.double().numpy(), axis=1), rtol=1e-12)


def test_a_group_without_scores_and_nan_scores_are_refused() -> None:
    members = [Tied("bias", 0, torch.zeros(2, 1, dtype=torch.long))]
    with pytest.raises(ConfigError, match="no weights with scores"):
        reduce_scores(members, {})
    with pytest.raises(DataError, match="NaN"):
        reduce_scores(members, {"bias": torch.tensor([float("nan"), 1.0])})


def test_many_small_scores_are_summed_in_float64() -> None:
    """A float32 running sum of 2^24 ones and small parts would stop growing."""
    scores = torch.full((1, 1 << 20), 1e-8)
    scores[0, 0] = 1.0
    members = [Tied("w", 0, torch.tensor([[0]]))]
    assert reduce_scores(members, {"w": scores}).item() == pytest.approx(1 + 1e-8 * ((1 << 20) - 1), rel=1e-9)


def test_normalised_scores_have_mean_one() -> None:
    assert mean_normalised(torch.tensor([1.0, 2.0, 6.0])).tolist() == pytest.approx([1 / 3, 2 / 3, 2])
