"""Units chosen on inputs that earlier cuts have changed: against the same choice made by hand, cut after cut."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.criteria import OBS, Consumer, Units
from gracile.data import Data
from gracile.graph import trace
from gracile.solvers import LeastSquares
from gracile.steps.pruning.sequence import choose_in_sequence


def chain() -> nn.Sequential:
    torch.manual_seed(2)
    layers = (nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    return nn.Sequential(*layers).double().eval()


def chosen(net: nn.Sequential, data: Data, keep: dict[str, list[int]]) -> dict[str, list[int]]:
    traced = trace(net, lambda m: m(next(iter(data.calibration_batches))))
    groups = [g for g in traced.groups if g.frozen is None and g.units > 1]
    names = {m.tensor: g.name for g in groups for m in g.members if m.role == "producer"}
    wanted = {names[f"{layer}.weight"]: kept for layer, kept in keep.items()}
    found = choose_in_sequence(
        net, traced, groups, wanted, OBS(swap_sweeps=0), LeastSquares(1e-9), Context(data, net, net)
    )
    return {layer: found.keep[names[f"{layer}.weight"]] for layer in keep}


def centred(x: np.ndarray) -> np.ndarray:
    difference: np.ndarray = x - x.mean(0)
    return difference


def fit(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary least squares by NumPy: weight [out, d], and what it computes."""
    weight = np.linalg.lstsq(centred(x), centred(y), rcond=None)[0].T
    return weight, centred(x) @ weight.T + y.mean(0)


def best(x: np.ndarray, weight: np.ndarray, count: int) -> list[int]:
    gram = torch.from_numpy(2 * centred(x).T @ centred(x) / len(x))
    columns = torch.arange(x.shape[1]).unsqueeze(1)
    scores = OBS().unit_scores(
        Units(consumers=(Consumer("", torch.from_numpy(weight), gram, torch.zeros(len(gram)), columns),))
    )
    return sorted(torch.argsort(scores, descending=True)[:count].tolist())


def test_the_second_group_is_scored_behind_the_first_cut_and_refitted() -> None:
    net = chain()
    batches = [torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    data = Data(calibration=batches)
    x = batches[1].numpy()  # the first batch in eight is held out
    with torch.no_grad():
        hidden, middle, last = (net[:i](batches[1]).numpy() for i in (2, 3, 5))
    first = best(hidden, net[2].weight.detach().numpy(), 5)
    _, narrow = fit(hidden[:, first], middle)
    weight, _ = fit(np.maximum(narrow, 0), last)
    second = best(np.maximum(narrow, 0), weight, 4)
    found = chosen(net, data, {"0": [0] * 5, "2": [0] * 4})
    assert found == {"0": first, "2": second}
    # and this is not what the scores of the uncut net say
    assert x.shape == (200, 5) and second != best(np.maximum(middle, 0), net[4].weight.detach().numpy(), 4)


def test_the_model_is_left_as_it_was_and_counts_are_kept() -> None:
    net = chain()
    before = copy.deepcopy(net.state_dict())
    data = Data(calibration=[torch.randn(40, 5, dtype=torch.float64)])
    found = chosen(net, data, {"2": [0, 1, 2]})
    assert len(found["2"]) == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Twice(nn.Module):
    """The reader of the group is called twice: what it gets cannot be told by one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu()) + self.second(self.first(-x).relu())
        return out


def test_a_layer_called_twice_is_still_pruned() -> None:
    step = gc.Prune(0.5, criterion=OBS(), pattern=gc.Channels(), repair=LeastSquares())
    result = gc.compress(Twice().eval(), step, Data(calibration=[torch.randn(30, 4) for _ in range(2)]))
    assert result.model.first.out_features == 4
