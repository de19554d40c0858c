"""Triangular systems, as gated linear attention solves them over positions: channels of the right-hand side pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gracile.graph import check_cut, plan_resize, trace
from gracile.surgery import apply

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
MIXED = "'linalg_solve_triangular' mixes along it"


class Solved(nn.Module):
    """(I + tril(x·xᵀ))⁻¹·a(x), or with the system on the other side of aᵀ."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.a, self.o = left, nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        system = torch.eye(5, dtype=x.dtype) + (x @ x.transpose(1, 2)).tril(-1) / 8
        h = self.a(x)
        if self.left:
            return self.o(torch.linalg.solve_triangular(system, h, upper=False))
        return self.o(torch.linalg.solve_triangular(system, h.transpose(1, 2), upper=False, left=False).transpose(1, 2))


@pytest.mark.parametrize("left", [True, False])
def test_the_dimension_that_is_not_solved_for_is_cut_exactly(left: bool) -> None:
    model = Solved(left)
    found = trace(model, lambda m: m(X))
    assert {g.name: g.exact for g in found.groups if g.frozen is None} == {"a": None}
    small = copy.deepcopy(model)
    keep = {"a": [0, 2, 5]}
    apply(small, [plan_resize(found, keep)])
    assert check_cut(model, small, found, keep, lambda m: m(X)).exact


def test_what_the_system_mixes_stays_whole() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).transpose(1, 2)
            return self.o(torch.linalg.solve_triangular(torch.eye(8), h, upper=False).transpose(1, 2))

    assert {g.name: g.frozen for g in trace(Mixed(), lambda m: m(X)).groups}["a"] == MIXED
