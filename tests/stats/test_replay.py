"""Forwards that start at a layer: the same outputs as from the start, with what is before not run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.data import Data
from gracile.stats import replay as module
from gracile.stats.replay import Replay
from gracile.stats.sums import read_inputs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.runs = nn.Linear(6, 9), nn.Linear(9, 6), 0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.runs += 1
        y = self.outer(F.relu(self.inner(x), inplace=True))
        y += x  # into the layer's own output: what is replayed must not be written into
        return y, {"mean": y.mean()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList([Block(), Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x, more = block(x)
            x += more["mean"]
        out: Tensor = self.head(x)
        return out


LAYERS = ["stem", *(f"blocks.{i}.{name}" for i in range(3) for name in ("inner", "outer")), "head"]


def made(net: nn.Module) -> tuple[Replay, list[Tensor]]:
    torch.manual_seed(1)
    data = [torch.randn(5, 4) for _ in range(3)]
    return Replay(net.eval(), Data(calibration=data), data), data


def test_layer_after_layer_changed_gives_what_a_forward_from_the_start_gives() -> None:
    torch.manual_seed(0)
    net = Net()
    replay, data = made(net)
    with torch.no_grad():
        for name in LAYERS:
            replay.seek(name)
            for _ in range(2):
                net.get_parameter(f"{name}.weight").mul_(0.9)
                for i, x in enumerate(data):
                    assert torch.equal(replay.run(i), net(x)), name
    assert replay.works


def test_finished_blocks_are_not_run_again() -> None:
    net = Net()
    replay = made(net)[0]
    replay.seek("blocks.2.inner")
    for i in range(3):
        replay.run(i)
    before = [block.runs for block in net.blocks]
    for i in range(3):
        replay.run(i)
    assert [block.runs - runs for block, runs in zip(net.blocks, before, strict=True)] == [0, 0, 3]
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in net.modules())


def test_going_back_forgets_what_came_later() -> None:
    net = Net()
    replay, data = made(net)
    replay.seek("head")
    replay.run(1)
    replay.seek("blocks.0.outer")
    with torch.no_grad():
        net.blocks[0].outer.weight.mul_(2)  # type: ignore[operator,union-attr]
        assert torch.equal(replay.run(1), net(data[1]))


def test_a_stopped_forward_still_notes_what_ended() -> None:
    net = Net()
    replay = made(net)[0]
    replay.seek("blocks.1.inner")
    x = read_inputs(net, ["blocks.1.inner"], lambda _: replay.run(2))["blocks.1.inner"]
    runs = net.blocks[0].runs
    again = read_inputs(net, ["blocks.1.inner"], lambda _: replay.run(2))["blocks.1.inner"]
    assert torch.equal(x, again) and net.blocks[0].runs == runs


def test_of_finished_blocks_only_what_is_read_is_held() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)]
    net = nn.Sequential(nn.Linear(4, 64), *blocks)
    replay, data = made(net)
    replay.seek("6.0")
    for i in range(len(data)):
        replay.run(i)
    held = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in replay.held())}
    assert sum(held.values()) < 2 * len(data) * 5 * 64 * 4  # one block's output, not five
    with torch.no_grad():
        assert all(torch.equal(replay.run(i), net(x)) for i, x in enumerate(data))


class Counter(nn.Module):
    """Its output depends on how often it has been called: it cannot be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.first(x) + self.calls
        return out


def test_a_module_that_keeps_a_state_is_run_each_time() -> None:
    net = nn.Sequential(Counter(), nn.Linear(4, 2))
    replay = made(net)[0]
    replay.seek("1")
    assert not replay.works
    calls: Any = net[0].calls
    replay.run(0)
    assert net[0].calls == calls + 1


class Twice(nn.Module):
    """One layer called twice and another that gives more than tensors: their outputs are not held."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.odd, self.last = nn.Linear(4, 4), Odd(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.odd(self.shared(self.shared(x)))[0])
        return out


class Odd(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        return x + 1, object()


def test_what_is_called_twice_or_gives_no_tensors_is_run() -> None:
    net = Twice()
    replay, data = made(net)
    replay.seek("last")
    with torch.no_grad():
        assert all(torch.equal(replay.run(i), net(x)) for i, x in enumerate(data)) and replay.works


def test_where_outputs_would_take_too_much_all_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 100)
    net = Net()
    replay, data = made(net)
    replay.seek("head")
    assert not replay.works and torch.equal(replay.run(0), net(data[0]))
