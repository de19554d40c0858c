"""Proof of a cut: what fails is left whole, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gracile as gc
from gracile.errors import GracileError, ModelError, NothingChangedError
from gracile.graph import trace
from gracile.recipe import Recorder
from gracile.steps.pruning.cut import cut_checked

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


class Chain(nn.Module):
    """Eight layers; those in `fixed` fail for any other width than the one they were made with."""

    def __init__(self, fixed: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.fixed = fixed
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in [(5, 8), *[(8, 8)] * 6, (8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i in self.fixed and len(layer.weight.detach().tolist()) != 8:  # seen by no operator
                raise RuntimeError(f"layer {i} wants eight")
        return x


def cut(model: nn.Module, run: Callable[[nn.Module], Any] = lambda m: m(X)) -> tuple[set[str], dict[str, str]]:
    """Groups cut to half, and those left whole with the reason."""
    traced = trace(model, run)
    keep = {g.name: list(range(g.units // 2)) for g in traced.groups if g.frozen is None}
    recorder = Recorder(gc.Prune(0.5, pattern=gc.Channels()))
    kept, _ = cut_checked(model, traced, keep, run, recorder)
    return set(kept), {row.name: row.reason for row in recorder.layers}


@pytest.mark.parametrize("fixed", [(), (0,), (3,), (2, 5), (0, 1, 6)])
def test_only_the_groups_that_fail_are_left_whole(fixed: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Chain(fixed).eval()
    kept, left = cut(model)
    assert kept == {f"layers.{i}" for i in range(7) if i not in fixed}
    assert set(left) == {f"layers.{i}" for i in fixed}
    assert all(f"layer {name[-1]} wants eight" in reason for name, reason in left.items())
    assert model(X).shape == (6, 3)
    assert [layer.out_features for layer in model.layers][:7] == [8 if i in fixed else 4 for i in range(7)]


def test_where_nothing_passes_the_model_stays_as_it_was() -> None:
    model = Chain(tuple(range(7))).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NothingChangedError, match="wants eight"):
        cut(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Branching(nn.Module):
    """Takes another path for batches with a large first entry, on which the number eight is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if float(x[0, 0]) > 10:
            h = h.view(-1, 2, 4).flatten(1)
        return self.c(F.relu(self.b(h)))


def test_a_path_that_only_a_later_batch_takes_leaves_its_group_whole() -> None:
    other = X.clone()
    other[0, 0] = 11
    step = gc.Prune(0.4, pattern=gc.Channels(), allocation=gc.allocate.Uniform(), correct=False)
    one = gc.compress(Branching(), step, gc.Data(calibration=[X]))
    assert [one.model.a.out_features, one.model.b.out_features] == [5, 7]
    both = gc.compress(Branching(), step, gc.Data(calibration=[X, other]))
    assert [both.model.a.out_features, both.model.b.out_features] == [8, 7]
    assert "does not run" in next(row.reason for row in both.report.steps[0].layers if row.name == "a")
    assert both.model(other).shape == (6, 3)


class Mutating(nn.Module):
    """Counts its calls in a buffer, an attribute and a list, and rebinds a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.seen = 0, ["first"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.seen.append("again")
        self.act = nn.ReLU()
        return self.b(self.act(self.a(x))) + self.calls


def test_a_model_that_changes_itself_is_cut_and_keeps_its_state() -> None:
    model = Mutating()
    kept, _ = cut(model)
    assert kept == {"a"}
    assert (model.count, float(model.calls), model.seen) == (0, 0.0, ["first"])
    assert "act" not in model._modules


class Chancy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x + torch.randn(x.shape))))


def test_a_forward_that_draws_random_numbers_is_compared_with_the_same_ones() -> None:
    state = torch.get_rng_state()
    assert cut(Chancy())[0] == {"a"}
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    Chancy()(X), Chancy()(X)
    assert after.shape == state.shape


def test_parameters_that_share_memory_or_are_laid_out_otherwise_are_cut() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].weight = nn.Parameter(torch.randn(5, 8).t())
    model[4].weight = nn.Parameter(torch.randn(16, 3).t()[:, ::2])
    assert not model[0].weight.is_contiguous() and not model[4].weight.is_contiguous()
    kept, _ = cut(model)
    assert kept == {"0", "2"}
    tied = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    tied[4].weight = tied[2].weight
    kept, _ = cut(tied)
    assert tied[4].weight is tied[2].weight
    assert tied(X).shape == (6, 3)


@pytest.mark.parametrize("device", ["meta"])
def test_a_model_without_values_is_refused_with_the_way_out(device: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8, device=device), nn.ReLU(), nn.Linear(8, 3, device=device))
    with pytest.raises(ModelError, match="Load the weights first"):
        gc.compress(model, gc.Prune(0.5, pattern=gc.Channels()), gc.Data(calibration=[X]))
    assert issubclass(ModelError, GracileError)
