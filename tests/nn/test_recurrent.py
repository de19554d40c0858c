"""Recurrent layers with encoded weights: against the float layer of the decoded weights, however they are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gracile.errors import ArtifactError, ConfigError
from gracile.formats import Format, Int, PerGroup, format_to_config
from gracile.nn import QuantizedRecurrent, begin_training, build_layer, end_training, recurrent_kind

LAYERS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.GRU, {"batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "dropout": 0.5}),
    (nn.LSTM, {"bidirectional": True, "bias": False}),
    (nn.LSTM, {"proj_size": 3}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
every_layer = pytest.mark.parametrize(("kind", "settings"), LAYERS, ids=str)


def build(kind: type[nn.RNNBase], settings: dict[str, Any]) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(6, 8, **settings).eval()  # type: ignore[call-arg]


def quantized(old: nn.RNNBase, fmt: Format) -> QuantizedRecurrent:
    new = build_layer(str(recurrent_kind(old)), {"weight": format_to_config(fmt)}, old).eval()
    assert isinstance(new, QuantizedRecurrent)
    for name, encoded in new.encoded.items():
        encoded.set_weight(fmt.encode(getattr(old, name)))  # type: ignore[operator]
    return new


def decoded(old: nn.RNNBase, fmt: Format) -> nn.RNNBase:
    """The float layer with every matrix rounded by the format itself."""
    new = copy.deepcopy(old)
    for parameter in new.parameters():
        if parameter.ndim == 2:
            parameter.data = fmt.decode(fmt.encode(parameter.data))
    return new


def outputs(layer: nn.Module, x: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(layer(x)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("fmt", [Int(8), Int(4, PerGroup(4), symmetric=False)], ids=str)
@every_layer
def test_it_computes_with_the_decoded_weights(kind: type[nn.RNNBase], settings: dict[str, Any], fmt: Format) -> None:
    old = build(kind, settings)
    new, expected, x = quantized(old, fmt), decoded(old, fmt), torch.randn(5, 4, 6)
    assert isinstance(new, kind)
    for found, wanted in zip(outputs(new, x), outputs(expected, x), strict=True):
        torch.testing.assert_close(found, wanted)
    again = outputs(new.to_float(), x)
    assert all(torch.equal(a, b) for a, b in zip(again, outputs(expected, x), strict=True))
    assert torch.equal(new.weight_hh_l0, expected.weight_hh_l0)
    assert [[t.shape for t in row] for row in new.all_weights] == [[t.shape for t in row] for row in old.all_weights]


@every_layer
def test_copies_states_and_conversions_keep_it(kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    old = build(kind, settings)
    new, x = quantized(old, Int(4)), torch.randn(5, 4, 6)
    twin = build_layer(str(recurrent_kind(old)), {"weight": format_to_config(Int(4))}, build(kind, settings)).eval()
    twin.load_state_dict(new.state_dict())
    for other in (copy.deepcopy(new), twin):
        assert all(torch.equal(a, b) for a, b in zip(outputs(other, x), outputs(new, x)))
    codes = sum(t.nbytes for name, t in new.state_dict().items() if name.endswith("codes"))
    assert codes == sum(-(-p.numel() // 2) for p in old.parameters() if p.ndim == 2)
    half = outputs(copy.deepcopy(new).double(), x.double())
    torch.testing.assert_close(half[0].float(), outputs(new, x)[0], rtol=1e-4, atol=1e-5)


def test_packed_sequences_and_given_states() -> None:
    old = build(nn.LSTM, {"batch_first": True})
    new, expected = quantized(old, Int(8)), decoded(old, Int(8))
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 3, 2]), batch_first=True)
    state = (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    with torch.no_grad():
        (a, a_state), (b, b_state) = new(packed, state), expected(packed, state)
    torch.testing.assert_close(pad_packed_sequence(a)[0], pad_packed_sequence(b)[0])
    torch.testing.assert_close(a_state, b_state)


def test_it_trains_on_its_grids() -> None:
    old, x = build(nn.GRU, {}), torch.randn(5, 4, 6)
    model = nn.ModuleDict({"rnn": quantized(old, Int(3))})
    original = nn.ModuleDict({"rnn": old})
    before = outputs(model["rnn"], x)[0]
    begin_training(model, original)
    torch.testing.assert_close(outputs(model["rnn"], x)[0], before)
    held = model["rnn"].encoded["weight_ih_l0"].weight.detach()  # type: ignore[union-attr,index]
    assert not torch.equal(held, model["rnn"].weight_ih_l0)  # it starts nearer to the original than its code is
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        model["rnn"](x)[0].square().mean().backward()
        optimizer.step()
    trained = outputs(model["rnn"], x)[0]
    end_training(model)
    torch.testing.assert_close(outputs(model["rnn"], x)[0], trained)
    assert float(trained.square().mean()) < 0.9 * float(before.square().mean())
    assert {name.split(".")[-1] for name, _ in model.named_parameters()} == {"bias_ih_l0", "bias_hh_l0"}


def test_what_has_no_quantized_layer() -> None:
    class Own(nn.GRU):
        def forward(self, x: Any, hx: Any = None) -> Any:
            return super().forward(x, hx)

    assert recurrent_kind(Own(2, 2)) is None and recurrent_kind(nn.Linear(2, 2)) is None
    assert recurrent_kind(quantized(build(nn.GRU, {}), Int(8))) is None
    config = {"weight": format_to_config(Int(8)), "input": format_to_config(Int(8))}
    with pytest.raises(ConfigError, match="stay in floating point"):
        build_layer("QuantizedGRU", config, build(nn.GRU, {}))
    with pytest.raises(ArtifactError, match="cannot stand for a Linear"):
        build_layer("QuantizedGRU", {"weight": format_to_config(Int(8))}, nn.Linear(2, 2))
