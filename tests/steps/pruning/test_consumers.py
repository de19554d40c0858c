"""Who reads a group, and the moments of what they read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Data
from gracile.graph import trace
from gracile.steps.pruning.consumers import collect_consumers, readers


class Net(nn.Module):
    """A convolution read by one behind a batch norm and by a flattened linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second, self.norm = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head, self.other = nn.Linear(4 * 16, 5, bias=False), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y: Tensor = self.head(x.flatten(1)) + self.other(self.norm(self.second(x)).mean((2, 3)))
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x)[0][:, -1])
        return y


def test_columns_and_moments_are_those_of_the_unfolded_inputs() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    data = Data(calibration=[torch.randn(6, 2, 4, 4) for _ in range(3)])
    traced = trace(net, lambda m: m(torch.randn(2, 2, 4, 4)))
    group = next(g for g in traced.groups if g.frozen is None and "first.weight" in {m.tensor for m in g.members})
    original = copy.deepcopy(net)
    found = collect_consumers(net, traced, [group], Context(data, original, original))[group.name]
    assert {c.layer for c in found} == {"second", "head"}
    for consumer in found:
        columns = consumer.columns
        assert columns.shape[0] == 4 and sorted(columns.flatten().tolist()) == list(range(consumer.weight.shape[1]))
        assert columns.shape[1] == (9 if consumer.layer == "second" else 16)
        assert torch.equal(columns[1], torch.arange(columns.shape[1], 2 * columns.shape[1]))
    with torch.no_grad():
        x = torch.relu(net.first(torch.cat(list(data.calibration)))).double()
    rows = x.flatten(1)
    head = next(c for c in found if c.layer == "head")
    # Nothing takes up a shift of its inputs: second moments about zero. Products of a batch are float32.
    torch.testing.assert_close(head.gram, 2 * rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 36)
    second = next(c for c in found if c.layer == "second")
    torch.testing.assert_close(second.gram, 2 * torch.cov(patches.T, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.mean, patches.mean(0), rtol=1e-6, atol=1e-7)


def test_a_group_that_a_recurrent_layer_reads_too_has_no_readers() -> None:
    net = Recurrent().eval()
    traced = trace(net, lambda m: m(torch.randn(2, 5, 3)))
    hidden = next(g for g in traced.groups if g.kind == "hidden")
    assert "head.weight" in {member.tensor for member in hidden.members}
    assert readers(net, hidden) == {}


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_convolutions_are_no_readers(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=groups), nn.Flatten(), nn.Linear(96, 2)).eval()
    traced = trace(net, lambda m: m(torch.randn(2, 2, 4, 4)))
    for group in (g for g in traced.groups if g.frozen is None):
        assert "1" not in readers(net, group) or groups == 1
