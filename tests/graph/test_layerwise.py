"""Stacked recurrent layers keep their own hidden units wherever their states tie nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gracile.graph import Group, Trace, trace
from gracile.graph.check import check_cut
from gracile.graph.plan import plan_resize
from gracile.surgery import apply

X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
NETS: dict[str, Callable[[], nn.RNNBase]] = {
    "GRU": lambda: nn.GRU(5, 6, 2, batch_first=True),
    "GRU, time first": lambda: nn.GRU(5, 6, 3),
    "GRU in both directions": lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True),
    "LSTM in both directions": lambda: nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True),
    "LSTM without biases": lambda: nn.LSTM(5, 6, 2, bias=False, dropout=0.5),
    "LSTM with projection": lambda: nn.LSTM(5, 6, 2, proj_size=4, bidirectional=True),
    "tanh": lambda: nn.RNN(5, 6, 2, bidirectional=True),
    "relu": lambda: nn.RNN(5, 6, 2, nonlinearity="relu", batch_first=True),
}
Forward = Callable[[nn.RNNBase, Tensor], Tensor]


class Net(nn.Module):
    """A recurrent layer, used as `forward` says, and a linear layer."""

    def __init__(self, rnn: nn.RNNBase, forward: Forward, width: int) -> None:
        super().__init__()
        self.rnn, self.use, self.out = rnn, forward, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.use(self.rnn, x))
        return result


def run(model: nn.Module) -> Any:
    return model(X)


def hidden(traced: Trace) -> list[Group]:
    return [g for g in traced.groups if g.kind == "hidden" and g.frozen is None]


def outputs(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    return rnn(x)[0].mean(1)


def last_state(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    return rnn(x)[1].transpose(0, 1).flatten(1)


def states_from_data(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    return rnn(x, x.mean().expand(2, len(x), rnn.hidden_size).contiguous())[0].mean(1)


def states_handed_on(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    _, state = rnn(x)
    return rnn(x, state)[0].mean(1)


def zeros_written_to(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    state = torch.zeros(2, len(x), rnn.hidden_size)
    state[1] += x.mean()
    return rnn(x, state)[0].mean(1)


def zeros_given(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    return rnn(x, torch.zeros(2, len(x), rnn.hidden_size))[0].mean(1)


def packed(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1])
    out, _ = pad_packed_sequence(rnn(pack_padded_sequence(x, lengths, batch_first=True))[0], batch_first=True)
    return out.mean(1)


@pytest.mark.parametrize("name", NETS)
def test_layers_run_one_by_one_give_what_pytorch_gives(name: str) -> None:
    torch.manual_seed(0)
    rnn = NETS[name]().eval()
    seen: list[Any] = []
    trace(rnn, lambda m: seen.append(m(X)))
    out, states = seen[0]
    expected, expected_states = rnn(X)
    torch.testing.assert_close(out, expected)  # float32 through other kernels: torch's own tolerance
    torch.testing.assert_close(states, expected_states)


@pytest.mark.parametrize("name", ["GRU", "GRU in both directions", "LSTM in both directions", "relu"])
def test_each_layer_and_direction_may_keep_other_units_but_as_many(name: str) -> None:
    torch.manual_seed(0)
    rnn = NETS[name]().eval()
    directions = 2 if rnn.bidirectional else 1
    model = Net(rnn, outputs, 6 * directions).eval()
    traced = trace(model, run)
    groups = hidden(traced)
    assert len(groups) == rnn.num_layers * directions
    assert len({g.tied_count for g in groups}) == 1 and groups[0].tied_count is not None
    rng = random.Random(0)
    keep = {g.name: sorted(rng.sample(range(6), 4)) for g in groups}
    assert len(set(map(tuple, keep.values()))) > 1
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(traced, keep)])
    check = check_cut(model, cut, traced, keep, run)
    assert check.exact and check.max_error is not None and check.max_error <= 1e-10  # float64
    assert cut.rnn.hidden_size == 4


def test_cells_and_projections_of_a_projected_lstm_each_have_a_count() -> None:
    free = [g for g in trace(Net(NETS["LSTM with projection"](), outputs, 8).eval(), run).groups if g.frozen is None]
    cells, projections = ([g for g in free if g.units == units] for units in (6, 4))
    assert len(cells) == len(projections) == 4  # two layers, two directions
    counts = [{g.tied_count for g in groups} for groups in (cells, projections)]
    assert len(counts[0]) == len(counts[1]) == 1 and None not in counts[0] | counts[1] and counts[0] != counts[1]


@pytest.mark.parametrize("use", [last_state, states_from_data, states_handed_on, zeros_written_to, packed])
def test_states_that_are_read_or_hold_data_tie_the_units_of_all_layers(use: Forward) -> None:
    torch.manual_seed(0)
    model = Net(nn.GRU(5, 6, 2, batch_first=True), use, 12 if use is last_state else 6).eval()
    layers = ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    holding = [{m.tensor for m in g.members}.intersection(layers) for g in trace(model, run).groups]
    assert sorted(map(sorted, filter(None, holding))) == [layers]  # one group, with both


def test_zeros_that_the_caller_gives_tie_nothing() -> None:
    assert len(hidden(trace(Net(nn.GRU(5, 6, 2, batch_first=True), zeros_given, 6).eval(), run))) == 2
