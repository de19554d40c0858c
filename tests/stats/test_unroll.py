"""What the matrices of recurrent layers read: against cells that take one sequence step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gracile.formats import Int, format_to_config
from gracile.nn import build_layer
from gracile.nn.dynamic_lstm import on_dynamic_grid
from gracile.stats.unroll import suffixes, unroll

KINDS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.GRU, {"batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "bias": False}),
    (nn.LSTM, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
]
CELLS: dict[str, Any] = {"GRU": nn.GRUCell, "LSTM": nn.LSTMCell, "RNN_TANH": nn.RNNCell, "RNN_RELU": nn.RNNCell}


def build(kind: type[nn.RNNBase], settings: dict[str, Any]) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(3, 4, dtype=torch.float64, **settings).eval()  # type: ignore[call-arg]


def by_cells(layer: nn.RNNBase, x: Tensor, suffix: str, starts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and states of one sequence [steps, inputs]. starts: states of each depth and direction, [·, hidden]."""
    level, outputs = x, list[Tensor]()
    for name in suffixes(layer):
        backward = name.endswith("reverse")
        if outputs and not backward:
            level, outputs = torch.cat(outputs, -1), []
        sequence = level.flip(0) if backward else level
        cell = CELLS[layer.mode](sequence.shape[1], layer.hidden_size, bias=layer.bias, dtype=torch.float64)
        if layer.mode == "RNN_RELU":
            cell.nonlinearity = "relu"
        cell.load_state_dict({key: getattr(layer, f"{key}_{name}") for key in dict(cell.named_parameters())})
        place = suffixes(layer).index(name)
        state: Any = [start[place][None] for start in starts]
        states = [state[0][0]]
        for step in sequence:
            found = cell(step[None], state if layer.mode == "LSTM" else state[0])
            state = found if layer.mode == "LSTM" else [found]
            states.append(state[0][0])
        if name == suffix:
            return sequence, torch.stack(states[:-1])
        after = torch.stack(states[1:])
        outputs.append(after.flip(0) if backward else after)
    raise AssertionError(suffix)


def in_order(rows: Tensor) -> Tensor:
    return rows[torch.argsort(rows @ torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype))]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
@torch.no_grad()
def test_padded_and_packed_sequences_with_states(kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    layer = build(kind, settings)
    first, lengths = layer.batch_first, [5, 2, 4]
    batch = torch.randn(3, 5, 3, dtype=torch.float64)
    depths = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(depths, 3, 4, dtype=torch.float64) for _ in range(2 if layer.mode == "LSTM" else 1)]
    hx: Any = tuple(states) if layer.mode == "LSTM" else states[0]
    sequences = batch if first else batch.transpose(0, 1)
    packed = pack_padded_sequence(sequences, torch.tensor(lengths), batch_first=first, enforce_sorted=False)
    for suffix in suffixes(layer):
        for call, counts in ((sequences, [5, 5, 5]), (packed, lengths)):
            found = unroll(layer, (call, hx), {}, suffix)
            wanted = [
                by_cells(layer, batch[i, :n], suffix, [state[:, i] for state in states]) for i, n in enumerate(counts)
            ]
            for rows, place in ((found.inputs, 0), (found.states, 1)):
                expected = torch.cat([each[place] for each in wanted])
                torch.testing.assert_close(in_order(rows), in_order(expected))


@torch.no_grad()
def test_a_single_sequence_without_states() -> None:
    layer = build(nn.GRU, {"batch_first": True})
    x = torch.randn(6, 3, dtype=torch.float64)
    found = unroll(layer, (), {"input": x}, "l0")
    inputs, states = by_cells(layer, x, "l0", [torch.zeros(1, 4, dtype=torch.float64)])
    torch.testing.assert_close(found.inputs, inputs)
    torch.testing.assert_close(found.states, states)


@torch.no_grad()
def test_states_of_a_layer_with_projections_are_projected() -> None:
    layer = build(nn.LSTM, {"proj_size": 2})
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    output, _ = layer(x)
    found = unroll(layer, (x,), {}, "l0")
    torch.testing.assert_close(found.states, torch.cat([torch.zeros(1, 2), output[:-1, 0]]).double())


def test_weights_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="only l0"):
        unroll(build(nn.GRU, {}), (torch.randn(2, 1, 3, dtype=torch.float64),), {}, "l1")


@torch.no_grad()
def test_of_dynamic_lstms_what_their_grids_leave() -> None:
    torch.manual_seed(0)
    old = nn.LSTM(3, 4, bidirectional=True).eval()
    layer: Any = build_layer("QuantizedLSTM", {"weight": format_to_config(Int(8)), "dynamic": True}, old).eval()
    for name, encoded in layer.encoded.items():
        encoded.set_weight(Int(8).encode(getattr(old, name)))
    x, starts = torch.randn(5, 2, 3), (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    given = layer(x, starts)[0]  # [steps, batch, both directions]
    for suffix, outputs, sequence, place in (
        ("l0", given[..., :4], x, 0),
        ("l0_reverse", given[..., 4:].flip(0), x.flip(0), 1),
    ):
        steps = unroll(layer, (x, starts), {}, suffix)
        torch.testing.assert_close(steps.inputs, on_dynamic_grid(sequence).flatten(0, 1))
        before = [starts[0][place], *outputs[:-1]]
        torch.testing.assert_close(steps.states, torch.cat([on_dynamic_grid(h) for h in before]))
