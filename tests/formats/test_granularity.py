from __future__ import annotations

import pytest
import torch

from gracile.errors import ConfigError
from gracile.formats import Granularity, PerChannel, PerGroup, PerTensor
from gracile.formats.granularity import from_rows, nearest_group_sizes, scale_shape, to_rows


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


def test_a_group_that_does_not_divide_names_the_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"100 columns(.|\n)*Use a size of 100, 50 or 25"):
        scale_shape(PerGroup(128), (8, 100))
    with pytest.raises(ConfigError, match="Use a size of 27, 9 or 3"):
        scale_shape(PerGroup(32), (8, 3, 3, 3))


def test_nearest_group_sizes_against_trial_division() -> None:
    for columns in (1, 7, 96, 100, 576, 997):
        divisors = [d for d in range(1, columns + 1) if columns % d == 0]
        for size in (1, 32, 128):
            expected = sorted(divisors, key=lambda d: (abs(d - size), d))[:3]
            assert nearest_group_sizes(columns, size) == expected


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerChannel(2), (3, 4)), (PerChannel(0), ()), (PerGroup(0), (3, 4)), (PerTensor(), (0, 4)), (Granularity(), (3,))],
)
def test_what_does_not_fit_is_refused(granularity: Granularity, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        scale_shape(granularity, shape)
