"""Recurrent layers rounded by a solver: nearer to the original than to nearest, however they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import gracile as gc

KINDS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.GRU, {}),
    (nn.GRU, {"bidirectional": True, "num_layers": 2}),
    (nn.LSTM, {"bias": False}),
    (nn.LSTM, {"proj_size": 5}),
    (nn.RNN, {}),
]


class Tagger(nn.Module):
    """An output at every step, which no loss of states is hidden from."""

    def __init__(self, kind: type[nn.RNNBase], settings: dict[str, Any], lengths: Tensor | None = None) -> None:
        super().__init__()
        self.rnn = kind(8, 16, batch_first=True, **settings)  # type: ignore[call-arg]
        self.lengths = lengths
        with torch.no_grad():
            for parameter in self.rnn.parameters():
                parameter.mul_(2)  # gates that move

    def forward(self, x: Tensor) -> Tensor:
        call: Any = x
        if self.lengths is not None:
            call = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        output: Any = self.rnn(call)[0]
        return output.data if self.lengths is not None else output


def sequences(count: int) -> Tensor:
    x = torch.randn(count, 12, 8) @ torch.linspace(0, 1, 64).view(8, 8).cos()
    return x.cumsum(1) / 3


def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = original(x)
        return float((model(x) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
def test_states_stay_nearer_to_the_originals(kind: type[nn.RNNBase], settings: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([12, 5, 9, 12, 7, 3, 11, 8] * 4) if packed else None
    model = Tagger(kind, settings, lengths).eval()
    data, test = gc.Data(calibration=[sequences(32) for _ in range(8)]), sequences(32)
    errors = []
    for solver in (None, gc.solvers.GPTQ()):
        result = gc.compress(model, gc.Quantize(gc.Int(3), solver=solver), data)
        errors.append(error(result.model, model, test))
    assert errors[1] < 0.75 * errors[0]
    (row,) = result.report.steps[-1].layers
    assert row.reason is not None and row.reason.startswith("GPTQ: 0.") and "weights only" in row.reason


def test_layers_before_and_behind_are_rounded_in_one_sequence() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.tagger = Tagger(nn.GRU, {})
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.tagger(self.embed(x)))
            return y

    model, data = Net().eval(), gc.Data(calibration=[sequences(32) for _ in range(8)])
    result = gc.compress(model, gc.Quantize(gc.Int(3), solver=gc.solvers.GPTQ()), data)
    rows = {row.name: row for row in result.report.steps[-1].layers if row.action == "quantized"}
    assert all("GPTQ: 0." in str(rows[name].reason) for name in ("embed", "tagger.rnn", "head"))
    nearest = gc.compress(model, gc.Quantize(gc.Int(3)), data)
    test = sequences(32)
    assert error(result.model, model, test) < 0.75 * error(nearest.model, model, test)


def test_what_was_pruned_stays_zero() -> None:
    torch.manual_seed(0)
    model = Tagger(nn.GRU, {}).eval()
    with torch.no_grad():
        model.rnn.weight_hh_l0[:, ::2] = 0
    data = gc.Data(calibration=[sequences(32) for _ in range(4)])
    result = gc.compress(model, gc.Quantize(gc.Int(3), solver=gc.solvers.GPTQ()), data)
    assert bool((result.model.rnn.weight_hh_l0[:, ::2] == 0).all())  # type: ignore[union-attr,index]


@pytest.mark.parametrize("fmt", [gc.formats.FixedPoint(factor=8), gc.formats.Codebook(2), gc.formats.NVFP4()], ids=str)
def test_formats_of_every_kind_are_rounded(fmt: gc.formats.Format) -> None:
    torch.manual_seed(0)
    data, test = gc.Data(calibration=[sequences(32) for _ in range(8)]), sequences(32)
    model = Tagger(nn.GRU, {}).eval()
    errors = []
    for solver in (None, gc.solvers.GPTQ()):
        result = gc.compress(model, gc.Quantize(fmt, solver=solver), data)
        errors.append(error(result.model, model, test))
    assert errors[1] < 0.8 * errors[0]
