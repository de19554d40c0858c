"""Rows of the original's outputs: what they are, that they stay the same, and how many layers are held at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gracile.data import Data
from gracile.stats import targets as module
from gracile.stats.moments import LayerMoments
from gracile.stats.targets import Targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.first(x)
        return x + self.norm(self.second(x.relu()))


def made(net: Net, rows: int = 10) -> tuple[Targets, list[Tensor]]:
    torch.manual_seed(1)
    data = [torch.randn(rows, 4) for _ in range(3)]
    sums = {"second": "norm"}
    return Targets(net, data, Data(calibration=data), ["first", "second"], torch.Generator(), sums), data


def test_outputs_without_bias_and_streams_by_batch() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    targets, data = made(net)
    first, second = targets.of("first"), targets.of("second")
    assert net.forwards == len(data)  # one pass for both layers
    assert not first.streams and first.counts == [10, 10, 10]
    for i, x in enumerate(data):
        torch.testing.assert_close(first.outputs[i], x @ net.first.weight.T, atol=1e-6, rtol=0)
        stream = net.first(x)
        torch.testing.assert_close(second.streams[i], stream)
        torch.testing.assert_close(second.outputs[i], stream.relu() @ net.second.weight.T, atol=1e-6, rtol=0)
    assert not net.first._forward_hooks and not net.norm._forward_hooks


def test_of_many_rows_some_are_drawn_at_the_same_places_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 12)
    net = Net().eval()
    targets, data = made(net)
    once = targets.of("second")
    assert [len(chosen) for chosen in once.chosen] == [4, 4, 4]
    assert not torch.equal(once.chosen[0], targets.of("first").chosen[0])
    for i, x in enumerate(data):
        assert torch.equal(once.streams[i], net.first(x)[once.chosen[i]])


def test_what_does_not_fit_is_measured_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net().eval()
    whole, _ = made(net)
    expected = {name: whole.of(name) for name in ("first", "second")}
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    targets, _ = made(net)
    for name in ("first", "second", "first"):
        found = targets.of(name)
        assert all(torch.equal(a, b) for a, b in zip(found.outputs, expected[name].outputs, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found.streams, expected[name].streams, strict=True))


def test_layers_whose_targets_do_not_fit_together_are_measured_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each target is measured once, not once for each batch."""
    net, model = Net().eval(), Net().eval()
    targets, _ = made(net)
    expected = LayerMoments(model, targets).measure_inputs(["second", "first"])
    before = net.forwards
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    targets, data = made(net)
    found = LayerMoments(model, targets).measure_inputs(["second", "first"])
    for name in ("first", "second"):
        assert torch.equal(found[name].gram, expected[name].gram)
        assert torch.equal(found[name].cross, expected[name].cross)
    forwards_to_seek = 4  # of the first batch, to see that replaying changes nothing
    assert net.forwards - before <= 2 * len(data) + forwards_to_seek


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_forwards_start_at_the_layer_and_end_behind_the_last_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    net = nn.Sequential(*(Counted(4, 4) for _ in range(5)))
    data = [torch.randn(3, 4) for _ in range(9)]
    targets = Targets(net, data, Data(calibration=data), [str(i) for i in range(5)], torch.Generator())
    for wanted in range(5):
        before = [layer.calls for layer in net]
        targets.of(str(wanted))
        runs = [layer.calls - count for layer, count in zip(net, before, strict=True)]
        assert runs[wanted] >= len(data)
        assert all(count < len(data) for i, count in enumerate(runs) if i not in (wanted - 1, wanted))
