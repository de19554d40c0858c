"""Spans of modules and reads of their outputs, on nets small enough to list both by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gracile.stats.timeline import Timeline, follow


class Skip(nn.Module):
    """a -> b -> c, and what a gave is read again by a view behind c; d gives what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        c = self.c(self.b(a))
        return self.d(c * a[:, :1])


class Chain(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def made(net: nn.Module) -> Timeline:
    return follow(net, lambda: net(torch.randn(3, 4)))


def test_modules_end_in_the_order_they_run_and_hold_those_inside_them() -> None:
    timeline = made(Chain(3))
    assert timeline.ended_before(timeline.spans["blocks.2"][0]) == ["blocks.0", "blocks.1"]
    assert timeline.ended_before(timeline.spans["blocks.2.1"][0]) == ["blocks.0", "blocks.1", "blocks.2.0"]
    assert timeline.ended_before(timeline.spans["blocks.0"][0]) == []


def test_of_a_chain_only_the_last_is_read() -> None:
    timeline = made(Chain(4))
    names = timeline.ended_before(timeline.spans["blocks.3"][0])
    assert timeline.read_without(names) == {"blocks.2"}


def test_what_a_view_reads_later_is_read() -> None:
    timeline = made(Skip())
    assert timeline.read_without(["a", "b"]) == {"a", "b"}  # b by c
    assert timeline.read_without(["a", "b", "c"]) == {"a", "c"}


def test_what_the_model_gives_is_read() -> None:
    timeline = made(Skip())
    assert timeline.read_without(["d"]) == {"d"}
    assert timeline.read_without(["a", "b", "c", "d"]) >= {"d"}


class Odd(nn.Module):
    """Called twice, and giving what is no tensor: neither has a span."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.odd = nn.Linear(4, 4), _Set()

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.twice(self.twice(x)))[0]


class _Set(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, set[int]]:
        return x + 1, {1}


def test_modules_called_twice_or_giving_other_than_tensors_have_no_span() -> None:
    assert made(Odd()).spans == {}
