"""Experts as one stacked weight: products by group, whose kernel wants aligned rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gracile as gc
from gracile.errors import ConfigError
from gracile.graph import check_cut, plan_resize, trace
from gracile.graph.axes import Atom, atoms, mark_aligned
from gracile.surgery import apply


class Experts(nn.Module):
    """Each row goes to one of three experts; rows are sorted by expert, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.router, self.out = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 32) / 4), nn.Parameter(torch.randn(3, 32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        order = self.router(x).argmax(-1).argsort(stable=True)
        ends = torch.bincount(self.router(x).argmax(-1), minlength=3).cumsum(0).to(torch.int32)
        y = torch._grouped_mm(x[order], self.up, offs=ends)
        y = torch._grouped_mm(F.relu(y), self.down, offs=ends)
        return self.out(y[order.argsort()])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Experts().eval()


X = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))


def test_experts_share_their_hidden_units_and_a_cut_equals_the_zeroed_original(model: nn.Module) -> None:
    traced = trace(model, lambda m: m(X))
    group = next(g for g in traced.groups if {m.tensor for m in g.members} == {"up", "down"} and g.frozen is None)
    assert (group.units, group.multiple_of) == (32, 4)  # 16 bytes of float32
    keep = {group.name: [i for i in range(32) if i % 4]}
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(traced, keep)])
    assert cut.up.shape == (3, 16, 24)
    assert check_cut(model, cut, traced, keep, lambda m: m(X)).exact
    with pytest.raises(ConfigError, match="no multiple of 4"):
        plan_resize(traced, {group.name: list(range(23))})


def test_defaults_keep_a_count_that_the_kernel_takes(model: nn.Module) -> None:
    step = gc.Prune(0.3, pattern=gc.Channels(), allocation=gc.allocate.Uniform())
    result = gc.compress(model, step, gc.Data(calibration=[X]))
    assert result.model.up.shape[2] < 32
    assert result.model.up.shape[2] % 4 == 0
    assert result.model(X).shape == (10, 4)


def test_alignment_passes_to_what_an_axis_is_tied_to_and_freezes_odd_sizes() -> None:
    from gracile.graph.algebra import unify

    a, b, odd = (Atom(8),), (Atom(8),), (Atom(6),)
    mark_aligned(a, 4)
    unify(a, b)
    assert [atom.multiple for atom in atoms(b)] == [4]
    mark_aligned(odd, 4)
    assert odd[0].frozen is not None
