from __future__ import annotations

import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import Granularity, PerChannel, PerGroup, PerTensor
from gracile.formats.granularity import from_rows, scale_shape, to_rows


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [(PerTensor(), ()), (PerChannel(0), (4,)), (PerChannel(-1), (3,)), (PerChannel(1), (6,)), (PerGroup(9), (4, 2))],
)
def test_rows_come_back_as_the_tensor(granularity: Granularity, expected: tuple[int, ...]) -> None:
    tensor = torch.arange(72).reshape(4, 6, 3)
    assert scale_shape(granularity, (4, 6, 3)) == expected
    rows = to_rows(granularity, tensor)
    assert rows.shape[0] == max(1, torch.zeros(expected).numel())
    assert torch.equal(from_rows(granularity, rows, (4, 6, 3)), tensor)


def test_rows_hold_the_weights_that_share_a_scale() -> None:
    tensor = torch.arange(12).reshape(3, 4)
    assert to_rows(PerChannel(1), tensor).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert to_rows(PerGroup(2), tensor).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_last_group_may_be_shorter() -> None:
    assert scale_shape(PerGroup(32), (8, 100)) == (8, 4) and scale_shape(PerGroup(128), (8, 100)) == (8, 1)
    tensor = torch.arange(1, 11, dtype=torch.uint8).reshape(2, 5)
    rows = to_rows(PerGroup(3), tensor)
    assert rows.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 10, 0]]
    assert torch.equal(from_rows(PerGroup(3), rows, (2, 5)), tensor)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerChannel(2), (3, 4)), (PerChannel(0), ()), (PerTensor(), (0, 4)), (Granularity(), (3,))],
)
def test_what_does_not_fit_is_refused(granularity: Granularity, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        scale_shape(granularity, shape)


def test_a_group_holds_at_least_one_weight() -> None:
    with pytest.raises(ConfigError, match=r"PerGroup\(size=0\)"):
        PerGroup(0)
