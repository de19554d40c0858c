"""Values written into a tensor at given places: which axes are tied, and that they hold data from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracile.graph import CutCheck, Trace, check_cut, plan_resize, trace
from gracile.surgery import apply

ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers of the same width, `combine` of what they give, and a layer that reads it."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.combine, self.a, self.b, self.o = combine, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.combine(self.a(x), self.b(x)))


def traced(model: nn.Module, x: Tensor) -> Trace:
    return trace(model, lambda m: m(x))


def cut(model: nn.Module, x: Tensor, group: str, kept: list[int]) -> CutCheck:
    found = traced(model, x)
    small = copy.deepcopy(model)
    apply(small, [plan_resize(found, {group: kept})])
    return check_cut(model, small, found, {group: kept}, lambda m: m(x))


def rows_put(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    out[torch.tensor([0, 2, 4])] = b[:3]
    return out + a


def rows_masked(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[torch.tensor([True, False, True, False, False])] = b[:2]
    return a


def middle_put(a: Tensor, b: Tensor) -> Tensor:
    """Indices on the second dimension of three: what is written has them in the same place."""
    a, b = a.unsqueeze(0).repeat(2, 1, 1), b.unsqueeze(0).repeat(2, 1, 1)
    a[:, torch.tensor([1, 3])] = b[:, :2]
    return a


def one_row(a: Tensor, b: Tensor) -> Tensor:
    """One row written to several places."""
    a = a.clone()
    a[torch.tensor([1, 3])] = b[0]
    return a


def rows_added(a: Tensor, b: Tensor) -> Tensor:
    return a.index_add(0, torch.tensor([0, 0, 2]), b[:3])


def rows_copied(a: Tensor, b: Tensor) -> Tensor:
    return a.index_copy(0, torch.tensor([4, 1]), b[:2])


@pytest.mark.parametrize("combine", [rows_put, rows_masked, middle_put, one_row, rows_added, rows_copied])
def test_units_of_rows_written_by_index_are_tied_and_cut_exactly(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(combine)
    (group,) = (g for g in traced(model, ROWS).groups if g.frozen is None)
    assert (group.units, group.exact) == (8, None)
    assert {(m.tensor, m.role) for m in group.members if "weight" in m.tensor} == {
        ("a.weight", "producer"),
        ("b.weight", "producer"),
        ("o.weight", "consumer"),
    }
    for kept in ([5], [0, 2, 3, 6, 7]):
        assert cut(model, ROWS, group.name, kept).exact


def test_units_that_are_themselves_indexed_are_frozen() -> None:
    def columns(a: Tensor, b: Tensor) -> Tensor:
        a = a.clone()
        a[:, torch.tensor([1, 3])] = b[:, :2]
        return a

    groups = traced(Net(columns), ROWS).groups
    assert next(g for g in groups if g.name == "a").frozen == "values are written into it by index"


class Score(nn.Module):
    """Queries times keys, where the keys are written into a tensor made empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.r, self.o = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(6, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        k, r = self.k(x), self.r(x)
        keys = x.new_empty(x.shape[0], k.shape[1] + r.shape[1])
        keys[:, : k.shape[1]] = k
        keys[:, k.shape[1] :] = r
        return self.o(self.q(x) @ keys.T)


def test_a_constant_that_data_are_written_into_is_data() -> None:
    """Its axis consumes nothing: summed over with the queries' it is known not to be exact, and nothing is "zeroed"."""
    free = [g for g in traced(Score(), ROWS).groups if g.frozen is None]
    reason = "it is summed over between two activations"
    assert [(g.units, g.exact) for g in free] == [(5, reason), (3, reason)]


@torch.library.custom_op("writes_test::roi_align", mutates_args=())
def pooled(input: Tensor, rois: Tensor) -> Tensor:
    """The mean over each box, as a map of one position: the schema's names are those of torchvision's operator."""
    rows = [input[int(n), :, int(t) : int(b), int(le) : int(r)] for n, le, t, r, b in rois.tolist()]
    return torch.stack([row.mean((1, 2), keepdim=True) for row in rows])


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.tensor([[0.0, 0, 0, 2, 2], [1.0, 1, 1, 3, 4], [1.0, 0, 0, 4, 4]])
        return self.fc(pooled(self.conv(x), boxes).flatten(1))


def test_channels_pass_pooling_over_boxes() -> None:
    with torch.no_grad():
        (group,) = (g for g in traced(Boxes(), IMAGE).groups if g.frozen is None)
        assert (group.name, group.units, group.exact) == ("conv", 8, None)
        assert cut(Boxes(), IMAGE, "conv", [1, 2, 6]).exact
