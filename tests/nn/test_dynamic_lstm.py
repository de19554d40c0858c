"""LSTMs with inputs and states rounded as they come: against the recurrence by hand, however they are called."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gracile.errors import ConfigError
from gracile.formats import Int, format_to_config
from gracile.nn import begin_training, build_layer, can_be_dynamic, end_training
from gracile.nn.dynamic_lstm import on_dynamic_grid

SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "num_layers": 2},
    {"bidirectional": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def build(settings: dict[str, Any], dynamic: bool = True, kind: type[nn.RNNBase] = nn.LSTM) -> Any:
    torch.manual_seed(0)
    old = kind(5, 6, **settings).eval()  # type: ignore[call-arg]
    config: dict[str, Any] = {"weight": format_to_config(Int(8))} | ({"dynamic": True} if dynamic else {})
    new: Any = build_layer(f"Quantized{kind.__name__}", config, old).eval()
    for name, encoded in new.encoded.items():
        encoded.set_weight(Int(8).encode(getattr(old, name)))
    return new


def by_hand(x: NDArray[Any]) -> NDArray[Any]:
    """DynamicQuantizeLinear and its inverse."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255 if high > low else 1.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def recurrence(layer: nn.LSTM, x: Tensor) -> NDArray[Any]:
    """Outputs [steps, batch, ·] of x [steps, batch, in] by the formulas of nn.LSTM's documentation, in NumPy."""
    weights = {n: getattr(layer, n).detach().double().numpy() for n in layer._flat_weights_names}
    y = x.double().numpy()
    for depth in range(layer.num_layers):
        outputs = []
        for end in ("", "_reverse") if layer.bidirectional else ("",):
            w, u = weights[f"weight_ih_l{depth}{end}"], weights[f"weight_hh_l{depth}{end}"]
            bias = weights[f"bias_ih_l{depth}{end}"] + weights[f"bias_hh_l{depth}{end}"] if layer.bias else 0.0
            rounded, h, c = by_hand(y), np.zeros((y.shape[1], 6)), np.zeros((y.shape[1], 6))
            seen = {}
            for t in reversed(range(len(y))) if end else range(len(y)):
                i, f, g, o = np.split(rounded[t] @ w.T + by_hand(h) @ u.T + bias, 4, axis=1)
                i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f, o))
                c = f * c + i * np.tanh(g)
                h = o * np.tanh(c)
                seen[t] = h
            outputs.append(np.stack([seen[t] for t in range(len(y))]))
        y = np.concatenate(outputs, axis=-1)
    return y


@every_setting
@torch.no_grad()
def test_it_is_the_recurrence_on_rounded_inputs_and_states(settings: dict[str, Any]) -> None:
    layer, x = build(settings), torch.randn(7, 4, 5)
    given = x.transpose(0, 1) if layer.batch_first else x
    y, (h, c) = layer(given)
    steps = y.transpose(0, 1) if layer.batch_first else y
    # float32 against float64 may put a value on an edge into the next code, a 255th of the states' range
    torch.testing.assert_close(steps, torch.from_numpy(recurrence(layer, x)).float(), rtol=0, atol=2e-3)
    off = (steps - torch.from_numpy(recurrence(layer, x)).float()).abs()
    assert float(off.median()) < 1e-6
    plain = build(settings, dynamic=False)(given)[0]
    assert 0 < float((y - plain).abs().max()) < 0.05
    assert h.shape == c.shape == (layer.num_layers * (1 + layer.bidirectional), 4, 6)
    torch.testing.assert_close(steps[-1, :, :6], h[-2 if layer.bidirectional else -1])


@every_setting
@torch.no_grad()
def test_states_go_on_where_they_were(settings: dict[str, Any]) -> None:
    layer, x = build({k: v for k, v in settings.items() if k != "bidirectional"}), torch.randn(8, 1, 5)
    x[3], x[7] = x.amin(), x.amax()  # both halves have the range of the whole
    x[2], x[6] = x.amax(), x.amin()
    given = x.transpose(0, 1) if layer.batch_first else x
    whole, ends = layer(given)
    axis = int(layer.batch_first)
    first, states = layer(given.narrow(axis, 0, 4))
    second, last = layer(given.narrow(axis, 4, 4), states)
    if layer.num_layers == 1:  # a second layer's inputs have another range in each half
        torch.testing.assert_close(torch.cat([first, second], axis), whole)
        torch.testing.assert_close(last, ends)
    with pytest.raises(RuntimeError, match="hidden size"):
        layer(given, (states[0][:, :, :3], states[1]))


@every_setting
@torch.no_grad()
def test_packed_and_single_sequences(settings: dict[str, Any]) -> None:
    layer = build(settings)
    x = torch.randn(3, 6, 5)
    x[0, 0], x[1, 0], x[2, 0] = (torch.full((5,), v) for v in (3.0, -3.0, 3.0))
    x[:, 1] = -x[:, 0]  # each sequence has the range of all
    packed = pack_padded_sequence(x, torch.tensor([4, 6, 2]), batch_first=True, enforce_sorted=False)
    y, (h, _) = layer(packed)
    assert isinstance(y, PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
    padded, lengths = pad_packed_sequence(y, batch_first=True)
    assert lengths.tolist() == [4, 6, 2] and padded.shape == (3, 6, 6 * (1 + layer.bidirectional))
    for i, length in enumerate([4, 6, 2]):
        alone, (own, _) = layer(x[i, :length])
        assert alone.shape == (length, padded.shape[-1]) and own.shape == h[:, i].shape
        # alone, its states have a scale of their own: a step of theirs apart, or two where layers are stacked
        torch.testing.assert_close(padded[i, :length], alone, rtol=0, atol=0.02)
        torch.testing.assert_close(h[:, i], own, rtol=0, atol=0.02)
    assert not padded[2, 2:].any()
    plain = pad_packed_sequence(build(settings, dynamic=False)(packed)[0], batch_first=True)[0]
    torch.testing.assert_close(padded, plain, rtol=0, atol=0.05)


def test_gradients_pass_straight_through() -> None:
    x = torch.tensor([-1.0, 0.003, 0.5, 2.0], requires_grad=True)
    y = on_dynamic_grid(x)
    (gradient,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), x)
    assert gradient.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(y.detach(), torch.from_numpy(by_hand(x.detach().numpy())).float())
    assert not torch.equal(y, x) and torch.equal(on_dynamic_grid(torch.zeros(3)), torch.zeros(3))


@torch.no_grad()
def test_a_batch_of_no_examples_gives_none() -> None:
    assert build({})(torch.zeros(7, 0, 5))[0].shape == (7, 0, 6)


def test_it_trains_and_stays_what_it_trained_to_be() -> None:
    layer, x = build(SETTINGS[3]).train(), torch.randn(4, 7, 5)
    begin_training(layer)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        trained = layer(x)[0]
        end_training(layer)
        torch.testing.assert_close(layer(x)[0], trained, rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])


@pytest.mark.parametrize(("kind", "settings"), [(nn.GRU, {}), (nn.RNN, {}), (nn.LSTM, {"proj_size": 3})])
def test_other_layers_have_no_such_kernel(kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    assert not can_be_dynamic(kind(5, 6, **settings))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="without projections"):
        build(settings, kind=kind)
