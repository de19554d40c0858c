"""Quantized layers: the float operator on decoded weights, built without them, loaded strictly."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.errors import ArtifactError, ConfigError
from gracile.formats import FixedPoint, Format, Int, PerChannel, PerGroup, PerTensor, format_to_config
from gracile.nn import (
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    build_layer,
    quantize_layer,
    quantized_kind,
)

ACTIVATION = Int(8, PerTensor(), symmetric=False)


def config_of(weight: Format, *, input: Int | None = None, output: Int | None = None) -> dict[str, Any]:
    formats = {"weight": weight, "input": input, "output": output}
    return {role: None if fmt is None else format_to_config(fmt) for role, fmt in formats.items()}


def quantized(old: nn.Module, weight: Format, *, input: Int | None = None, output: Int | None = None) -> QuantizedLayer:
    tensors = {f"weight_{name}": tensor for name, tensor in weight.encode(old.weight).items()}
    for role, fmt in (("input", input), ("output", output)):
        if fmt is not None:
            scale, zero_point = fmt.scale_of(torch.tensor(-2.0), torch.tensor(3.0))
            tensors[f"{role}_scale"] = scale
            tensors[f"{role}_zero_point"] = torch.tensor(0) if zero_point is None else zero_point
    return quantize_layer(old, tensors, config_of(weight, input=input, output=output))


LAYERS: list[tuple[nn.Module, tuple[int, ...], Format]] = [
    (nn.Linear(12, 7), (5, 12), Int(8)),
    (nn.Linear(12, 7, bias=False), (2, 3, 12), Int(4, PerGroup(6))),
    (nn.Linear(12, 7), (5, 12), FixedPoint(256)),
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), Int(8)),
    (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9), Int(3)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (2, 4, 9, 9), Int(8, PerTensor())),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 9), Int(8, symmetric=False)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), Int(5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), Int(8, PerChannel(1))),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5), Int(8, PerChannel(1))),
]
each_layer = pytest.mark.parametrize(("old", "shape", "fmt"), LAYERS)


@each_layer
def test_the_output_is_the_float_layers_with_the_decoded_weight(
    old: nn.Module, shape: tuple[int, ...], fmt: Format
) -> None:
    new, x = quantized(old, fmt), torch.randn(shape)
    twin = copy.deepcopy(old)
    twin.weight.data = fmt.decode(fmt.encode(old.weight))
    assert torch.equal(new(x), twin(x))
    assert not torch.equal(twin(x), old(x))  # the format rounds something, or this test shows nothing


@each_layer
def test_a_layer_built_from_its_configuration_loads_strictly(
    old: nn.Module, shape: tuple[int, ...], fmt: Format
) -> None:
    new, x = quantized(old, fmt), torch.randn(shape)
    fresh = build_layer(str(quantized_kind(old)), config_of(fmt), copy.deepcopy(old))
    fresh.load_state_dict(new.state_dict(), strict=True)
    assert torch.equal(fresh(x), new(x))
    assert "shape" not in " ".join(new.state_dict())


def test_inputs_and_outputs_are_rounded_to_their_grids() -> None:
    old, x = nn.Linear(6, 4), torch.randn(9, 6) * 3
    new = quantized(old, Int(8), input=ACTIVATION, output=Int(8, PerTensor()))

    def rounded(values: np.ndarray, scale: float, zero: int, low: int, high: int) -> np.ndarray:
        step = np.float32(scale)
        return (np.clip(np.round(values / step) + zero, low, high) - zero).astype(np.float32) * step

    seen = rounded(x.numpy(), float(new.input_scale), int(new.input_zero_point), 0, 255)
    y = seen @ new.decoded_weight().numpy().T + old.bias.detach().numpy()
    expected = rounded(y, float(new.output_scale), 0, -128, 127)
    # a sum on the edge between two codes may fall to either side, so the bound is one step of the output
    assert np.abs(new(x).detach().numpy() - expected).max() <= float(new.output_scale) * 1.001
    assert (np.abs(new(x).detach().numpy() - expected) < 1e-5).mean() > 0.9
    steps = new(x) / new.output_scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_an_embedding_reads_decoded_rows_and_keeps_its_padding() -> None:
    old = nn.Embedding(11, 8, padding_idx=0)
    new = quantized(old, Int(4, PerGroup(4)))
    ids = torch.tensor([[0, 3], [10, 3]])
    assert isinstance(new, QuantizedEmbedding)
    assert torch.equal(new(ids), new.decoded_weight()[ids])
    assert torch.equal(new(ids)[0, 0], torch.zeros(8))


def test_a_bias_appears_where_a_folded_batch_norm_gives_one() -> None:
    old = nn.Conv2d(3, 5, 1, bias=False)
    weight = Int(8).encode(old.weight)
    tensors = {f"weight_{name}": t for name, t in weight.items()} | {"bias": torch.arange(5.0)}
    new = quantize_layer(old, tensors, {**config_of(Int(8)), "bias": True})
    assert torch.equal(new(torch.zeros(1, 3, 1, 1)).flatten(), torch.arange(5.0))


def test_weight_reads_as_the_decoded_weight() -> None:
    new = quantized(nn.Linear(4, 3), Int(8))
    assert torch.equal(new.weight, new.decoded_weight())
    assert "weight" not in dict(new.named_parameters())


def test_fixed_point_codes_load_in_the_integer_type_they_were_saved_in() -> None:
    old = nn.Linear(4, 3)
    old.weight.data[0, 0] = 100.0  # 100 · 256 needs int16
    new = quantized(old, FixedPoint(256))
    fresh = build_layer("QuantizedLinear", config_of(FixedPoint(256)), nn.Linear(4, 3))
    fresh.load_state_dict(new.state_dict())
    assert float(fresh.weight[0, 0]) == 100.0


def test_half_precision_inputs_come_out_in_half_precision() -> None:
    new = quantized(nn.Linear(4, 3, bias=False), Int(8))
    assert new(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_which_layers_have_a_quantized_kind() -> None:
    assert quantized_kind(nn.Linear(2, 2)) == QuantizedLinear.__name__
    assert quantized_kind(nn.ConvTranspose3d(2, 2, 1)) == QuantizedConv.__name__
    assert quantized_kind(nn.Embedding(2, 2)) == QuantizedEmbedding.__name__
    assert quantized_kind(Scaled(2, 2)) is None  # its own forward would be lost
    assert quantized_kind(nn.Embedding(2, 2, max_norm=1.0)) is None  # writes to its table while reading it
    assert quantized_kind(nn.LSTM(2, 2)) is None
    assert quantized_kind(quantized(nn.Linear(2, 2), Int(8))) is None


def test_identity_stands_for_a_folded_batch_norm() -> None:
    assert isinstance(build_layer("Identity", {}, nn.BatchNorm2d(3)), nn.Identity)


def test_unknown_layers_and_impossible_configurations_are_refused() -> None:
    with pytest.raises(ArtifactError, match="'Exec' is not a layer"):
        build_layer("Exec", {}, nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match="cannot stand for a ReLU"):
        build_layer("QuantizedLinear", config_of(Int(8)), nn.ReLU())
    with pytest.raises(ConfigError, match="input of a layer"):
        build_layer("QuantizedLinear", config_of(Int(8), input=Int(8)), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="indices"):
        build_layer("QuantizedEmbedding", config_of(Int(8), input=ACTIVATION), nn.Embedding(2, 2))


def test_a_quantized_layer_shares_no_bias_with_the_old_one() -> None:
    old = nn.Linear(4, 3)
    before = old.bias.detach().clone()
    encoded = {f"weight_{name}": value for name, value in Int(8).encode(old.weight).items()}
    config = {"weight": format_to_config(Int(8)), "bias": True}
    new = quantize_layer(old, {**encoded, "bias": old.bias.detach()}, config)
    with torch.no_grad():
        new.bias.add_(1)  # type: ignore[union-attr]
    assert torch.equal(old.bias, before)
