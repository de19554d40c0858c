"""Sensitivity: what it measures by hand, and what a budget of bytes does with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.errors import ConfigError, DataError
from gracile.sensitivity import measure_sensitivity


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 6, generator=generator) for _ in range(4)]


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What one layer gives."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, y: found.append(y))
    model(x)
    handle.remove()
    return found[0]


def centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(1, keepdim=True)


def test_a_layer_alone_in_few_bits_and_corrected_is_what_is_measured() -> None:
    model, data = net(), gc.Data(calibration=batches())
    before = copy.deepcopy(model.state_dict())
    found = measure_sensitivity(model, data, (gc.Int(8), gc.Int(2)))
    assert found.schemes == (str(gc.Int(8)), str(gc.Int(2)))
    assert [(row.name, row.kind, row.parameters) for row in found.layers] == [
        ("0", "Linear", 84),
        ("2", "Linear", 156),
        ("4", "Linear", 52),
    ]
    x = torch.cat(batches())
    with torch.no_grad():
        expected = centred(model(x))
        for row in found.layers:
            for fmt, loss in zip((gc.Int(8), gc.Int(2)), row.losses):
                other = copy.deepcopy(model)
                layer = other.get_submodule(row.name)
                rows = outputs(other, row.name, x)
                layer.weight.data = fmt.decode(fmt.encode(layer.weight, gc.ranges.MSE().weight(layer.weight, fmt)))
                now = outputs(other, row.name, x)
                gain = rows.std(0) / now.std(0) if fmt.bits < 8 else torch.ones(len(layer.bias))
                layer.weight.data *= gain[:, None]
                layer.bias.data = gain * (layer.bias - now.mean(0)) + rows.mean(0)
                by_hand = (centred(other(x)) - expected).square().sum() / expected.square().sum()
                assert loss == pytest.approx(float(by_hand), rel=1e-3, abs=1e-7)
            assert row.losses[1] > 10 * row.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_norm_is_folded_in_a_copy_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    data = gc.Data(calibration=[torch.randn(16, 3, 6, 6) for _ in range(2)])
    found = measure_sensitivity(model, data)
    assert isinstance(model[1], nn.BatchNorm2d) and model[0].bias is not None
    assert found.schemes == ("W8A8", "W4A8", "W2A8")
    assert all(0 <= row.losses[0] < row.losses[2] for row in found.layers)
    assert found.to_json()["layers"][0]["name"] == "0"


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="has no data"):
        measure_sensitivity(net(), gc.Data())
    with pytest.raises(ConfigError, match="two schemes"):
        measure_sensitivity(net(), gc.Data(calibration=batches()), (gc.W8A8,))
