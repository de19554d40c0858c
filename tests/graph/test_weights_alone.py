"""What is computed from parameters alone: where zeros in them would not give zeros, and what no data pass through."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracile.graph import CutCheck, Group, check_cut, plan_resize, trace
from gracile.surgery import apply

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A layer, parameters of its width, and a layer that reads both in the way given."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.a, self.o = forward, nn.Linear(6, 8), nn.Linear(8, 2)
        self.p, self.w = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def group_of(model: nn.Module, layer: str) -> Group:
    return next(g for g in trace(model, lambda m: m(X)).groups if g.name == layer)


def cut(model: nn.Module, group: str, kept: list[int]) -> CutCheck:
    found = trace(model, lambda m: m(X))
    small = copy.deepcopy(model)
    apply(small, [plan_resize(found, {group: kept})])
    return check_cut(model, small, found, {group: kept}, lambda m: m(X))


def periodic(m: Net, x: Tensor) -> Tensor:
    """h + sin²(αh)/α, as vocoders have it."""
    h = m.a(x)
    return m.o(h + (m.p * h).sin() ** 2 * (m.p + 1e-9).reciprocal())


def decayed(m: Net, x: Tensor) -> Tensor:
    """Rates that are held as logarithms, as state-space layers have them."""
    return m.o(m.a(x) * torch.exp(-m.p.exp()))


@pytest.mark.parametrize("forward", [periodic, decayed])
def test_units_scaled_by_functions_of_parameters_are_cut_exactly(forward: Callable[[Net, Tensor], Tensor]) -> None:
    """exp(0) is 1, but the unit is gone wherever it is read, whatever scales it."""
    model = Net(forward)
    group = group_of(model, "a")
    assert (group.units, group.frozen, group.exact) == (8, None, None)
    assert cut(model, "a", [0, 3, 4, 6]).exact


def test_a_weight_whose_zeros_are_lost_is_not_exact_where_it_is_summed_over() -> None:
    model = Net(lambda m, x: m.a(x) @ m.w.exp())
    group = group_of(model, "a")
    assert group.exact == "a parameter passes 'exp', which does not keep zeros"
    check = cut(model, "a", [0, 3, 4, 6])
    assert check.ran and not check.exact


class Table(nn.Module):
    """A bias for each pair of positions by a small net of their distance: no data go through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.distances = nn.Buffer(torch.arange(-4.0, 5.0)[:, None])
        self.net = nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, 1))
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(5)[:, None] - torch.arange(5)[None] + 4
        mixing = self.net(self.distances)[index.flatten(), 0].view(5, 5)
        return self.o(mixing @ self.a(x))


def test_units_that_no_data_pass_through_are_no_channels() -> None:
    groups = {g.name: g.frozen for g in trace(Table(), lambda m: m(X)).groups if g.units > 1}
    assert groups["a"] is None
    assert groups["net.0"] == "no layer makes it: it is read from parameters or buffers alone"


class LowRank(nn.Module):
    """A weight that is itself a product of two: the layer's outputs are its units, the rank is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u, self.v, self.o = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x @ (self.u @ self.v))


def test_a_product_of_weights_makes_the_units_of_the_layer_that_it_is() -> None:
    free = [g for g in trace(LowRank(), lambda m: m(X)).groups if g.frozen is None]
    assert [(g.units, g.exact) for g in free] == [(8, None)]
    assert cut(LowRank(), free[0].name, [1, 2, 7]).exact
