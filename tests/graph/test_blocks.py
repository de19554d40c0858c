"""Which modules are residual blocks, on nets whose blocks are known."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.graph import Block, find_blocks


class Adds(nn.Module):
    """x + f(x), with the norm before or behind, and an activation behind or not."""

    def __init__(self, form: str = "plain", dim: int = 6) -> None:
        super().__init__()
        self.form, self.fc, self.norm = form, nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "plain":
            return x + self.fc(x)
        if self.form == "norm before":
            return self.fc(self.norm(x)) + x
        if self.form == "norm behind":
            return self.norm(x + torch.tanh(self.fc(x)))  # type: ignore[no-any-return]
        if self.form == "activation behind":
            return F.relu(x + self.fc(x))
        if self.form == "twice in place":
            x = x + self.fc(x)
            x += torch.sigmoid(self.fc(x))
            return x
        if self.form == "scaled":
            return torch.add(x, self.fc(x), alpha=0.5)
        if self.form == "no sum":
            return torch.relu(self.norm(x))
        if self.form == "sum with a parameter":
            return x + self.fc.weight[0]
        if self.form == "sum of branches":
            return self.fc(x) + self.fc(x.flip(-1))  # type: ignore[no-any-return]
        return self.fc(x)  # type: ignore[no-any-return]


def names(model: nn.Module, *inputs: Tensor) -> list[str]:
    return [block.name for block in find_blocks(model, lambda net: net(*inputs))]


@pytest.mark.parametrize(
    "form", ["plain", "norm before", "norm behind", "activation behind", "twice in place", "scaled"]
)
def test_a_sum_with_the_input_makes_a_block(form: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Adds(form), nn.Linear(6, 2))
    assert find_blocks(model, lambda net: net(torch.randn(3, 4))) == [Block("1", "Adds", None)]


@pytest.mark.parametrize("form", ["no sum", "sum with a parameter", "sum of branches", "plain layer"])
def test_other_modules_are_none(form: str) -> None:
    assert names(nn.Sequential(nn.Linear(4, 6), Adds(form), nn.Linear(6, 2)), torch.randn(3, 4)) == []


def test_a_block_on_the_model_s_own_input_counts_and_gradients_turned_off_do_not_hide_it() -> None:
    model = nn.Sequential(Adds(dim=6), nn.Linear(6, 2)).requires_grad_(False)
    with torch.no_grad():
        assert names(model, torch.randn(3, 6)) == ["0"]
    assert not any(p.requires_grad for p in model.parameters())


def test_of_nested_chains_the_innermost_blocks_count() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Sequential(Adds(), Adds("norm behind")), nn.ModuleDict({"x": Adds()})["x"]
    )
    assert names(model, torch.randn(3, 4)) == ["1.0", "1.1", "2"]


class Named(nn.Module):
    """A block held by name, which holds one itself; and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = Adds(), Adds(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.again(self.again(self.first(x))))
        return y


def test_blocks_held_by_name_count_and_a_shared_one_says_why_not() -> None:
    found = find_blocks(Named(), lambda net: net(torch.randn(3, 6)))
    assert found == [Block("first", "Adds", None), Block("again", "Adds", None, "it is called 2 times in one forward")]


def test_strided_blocks_of_a_residual_net_do_not_count() -> None:
    net = nets.ZOO["PadShortcut"]()
    assert names(net, torch.randn(2, 3, 12, 12)) == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize("build", [nets.MLP, nets.PlainConv], ids=lambda b: b.__name__)
def test_nets_without_sums_have_none(build: Callable[[], nets.Net]) -> None:
    net = build()
    example = net.example()
    assert isinstance(example, Tensor)
    assert names(net, example) == []
