"""Who reads which layer's output, on a net small enough to know by heart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.graph import Trace, trace


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3, self.drop = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.1)
        self.twice, self.bn4 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(self.conv1(x)), inplace=True)
        b = self.bn2(self.conv2(a))
        c = self.conv3(a)
        d = self.drop(self.bn3(c))
        y = torch.cat([a + b, d, c], 1)[:, :6]
        return self.fc(self.bn4(self.twice(self.twice(y))).mean((2, 3)))


def found() -> Trace:
    return trace(Graph(), lambda m: m(torch.randn(2, 3, 5, 5)))


def test_batch_norm_pairs_are_only_those_without_another_reader_that_run_once() -> None:
    assert found().batch_norm_pairs() == [("conv1", "bn1"), ("conv2", "bn2")]


def test_consumers_are_layers_or_operators() -> None:
    graph = found()
    assert graph.consumers("conv1") == ("module:bn1",)
    assert graph.consumers("bn1") == ("relu",)
    assert graph.consumers("bn2") == ("add",)
    assert graph.consumers("conv3") == ("module:bn3", "cat")
    assert graph.consumers("fc") == ()


def test_consumers_behind_operators_are_those_of_what_they_make() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.a(x))
            y = torch.relu(self.b(x)) + x
            return self.act(self.c(y)).mean((2, 3))

    graph = trace(Net(), lambda m: m(torch.randn(2, 3, 5, 5)))
    assert graph.consumers_behind("a", {"relu"}) == ("module:b", "add")
    assert graph.consumers_behind("a", set()) == ("relu",)
    assert graph.consumers_behind("b", {"relu"}) == ("add",)
    assert graph.consumers_behind("c", {"relu"}) == ("mean",)


def test_feeding_a_sum_sees_through_batch_norm_and_dropout_but_not_activations() -> None:
    graph = found()
    assert graph.feeds_sum("conv2")
    assert graph.feeds_sum("bn3")
    assert graph.feeds_sum("conv3")
    assert not graph.feeds_sum("conv1")
    assert not graph.feeds_sum("twice")
