"""Tensors read with strides: followed where they are the same elements in the same order, frozen elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.errors import NothingChangedError
from gracile.graph import trace


class Strided(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.a, self.b = read, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.read(torch.relu(self.a(x)))).flatten(1)


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def test_a_size_written_down_in_strides_is_found_by_running_the_cut_model() -> None:
    model = Strided(lambda h: h.unsqueeze(1).as_strided((4, 1, 8), (8, 99, 1)))
    assert {g.name: g.frozen for g in trace(model, lambda m: m(X)).groups}["a"] is None
    with pytest.raises(NothingChangedError, match="does not run"):
        gc.compress(model, gc.Prune(0.5, pattern=gc.Channels()), gc.Data(calibration=[X]))
    assert model.a.out_features == 8


@pytest.mark.parametrize("read", [lambda h: h.as_strided((4, 8), (1, 4)), lambda h: h.as_strided((2, 8), (8, 1), 8)])
def test_elements_in_another_order_freeze_what_they_come_from(read: Callable[[Tensor], Tensor]) -> None:
    groups = trace(Strided(read), lambda m: m(X)).groups
    assert next(g for g in groups if g.name == "a").frozen == "it is read with strides of its own"


def test_pooling_to_one_position_leaves_the_channels_free() -> None:
    model = nn.Sequential(nn.Conv1d(5, 8, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 5, 6)
    result = gc.compress(model, gc.Prune(0.5, pattern=gc.Channels()), gc.Data(calibration=[x]))
    assert result.model[0].out_channels == 4
    assert result.report.steps[0].numbers["cut_error"] <= 1e-10
