"""Inputs with a scale for each token: found as the model runs, without data, and as integers in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.errors import ConfigError
from gracile.formats import Int, PerGroup, PerToken, W7A8Dynamic, W8A8Dynamic, format_to_config
from gracile.nn import QuantizedLayer, begin_training, build_layer, end_training
from gracile.nn.ops import quantize_dequantize_per_token

GROUPED = gc.Scheme("W4A8 in groups", Int(4, PerGroup(8)), Int(8, PerToken()))


class Attention(nn.Module):
    """Two layers read one tensor, one of them without a bias; a convolution reads no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query = nn.Linear(16, 32), nn.Linear(32, 32, bias=False)
        self.key, self.out, self.mix = nn.Linear(32, 32), nn.Linear(32, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y: Tensor = self.mix(self.out(torch.relu(self.query(x) * self.key(x))).transpose(1, 2))
        return y


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


def tokens() -> Tensor:
    """One far larger than the others, and one of zeros."""
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 100
    x[1, 1] = 0
    return x


def test_the_textbook_formula() -> None:
    x = tokens()
    scale = np.abs(x.numpy()).max(-1, keepdims=True) / 127
    expected = np.round(x.numpy() / np.where(scale == 0, 1, scale)) * scale
    np.testing.assert_array_equal(quantize_dequantize_per_token(x, 127).numpy(), expected)


def test_gradients_pass() -> None:
    x = tokens().requires_grad_()
    quantize_dequantize_per_token(x, 127).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


def test_it_needs_no_data_and_stands_large_tokens() -> None:
    model, x = attention(), tokens()
    result = gc.compress(model, gc.Quantize(W8A8Dynamic), gc.Data())
    static = gc.compress(model, gc.Quantize(gc.W8A8), gc.Data(calibration=[x]))
    rows = {row.name: row for row in result.report.steps[0].layers}
    assert rows["mix"].reason == "weights only: its inputs have no tokens" and rows["query"].reason is None
    with torch.no_grad():
        errors = [float((net.model(x) - model(x))[1:].norm() / model(x)[1:].norm()) for net in (result, static)]
    assert errors[0] < 0.5 * errors[1]
    layer = result.model.first
    assert isinstance(layer, QuantizedLayer) and "input_scale" not in dict(layer.named_buffers())


def test_outputs_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = gc.compress(attention(), gc.Quantize(W8A8Dynamic), gc.Data()).model
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_it_trains_on_its_grids() -> None:
    original, x = attention(), tokens()
    model = gc.compress(original, gc.Quantize(W8A8Dynamic), gc.Data()).model
    before = model(x)
    begin_training(model, original)
    torch.testing.assert_close(model(x), before)
    assert "first.input_scale_change" not in dict(model.named_parameters())
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    end_training(model)
    torch.testing.assert_close(model(x), before)


def test_smoothing_lowers_the_error_of_channels_that_stand_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 16)
    x[:, 3] *= 60
    data = gc.Data(calibration=[x])
    plain = gc.compress(model, gc.Quantize(W8A8Dynamic), data).model
    smoothed = gc.compress(model, gc.Quantize(W8A8Dynamic, equalize=gc.equalize.SmoothQuant()), data).model
    with torch.no_grad():
        errors = [float((net(x) - model(x)).norm()) for net in (smoothed, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ConfigError, match="leave inputs in floating point"):
        gc.Quantize(W8A8Dynamic, equalize=gc.equalize.AWQ())
    with pytest.raises(ConfigError, match="PerToken\\(\\) is for inputs"):
        Int(8, PerToken()).encode(torch.randn(2, 2))
    weight, by_token = (format_to_config(fmt) for fmt in (Int(8), Int(8, PerToken())))
    asymmetric = format_to_config(Int(8, PerToken(), symmetric=False))
    bad: list[tuple[str, dict[str, Any], nn.Module]] = [
        ("QuantizedConv", {"weight": weight, "input": by_token}, nn.Conv1d(2, 2, 1)),
        ("QuantizedLinear", {"weight": weight, "output": by_token}, nn.Linear(2, 2)),
        ("QuantizedLinear", {"weight": weight, "input": asymmetric}, nn.Linear(2, 2)),
    ]
    for kind, config, layer in bad:
        with pytest.raises(ConfigError, match="PerTensor"):
            build_layer(kind, config, layer)


def exported(scheme: gc.Scheme, path: Path) -> tuple[Tensor, Tensor, Path]:
    """Outputs in PyTorch and in ONNX Runtime, and the file."""
    model, x = gc.compress(attention(), gc.Quantize(scheme), gc.Data()).model, tokens()
    file = gc.OnnxRuntime(1).export(model, x, path / "model.onnx")
    with torch.no_grad():
        return model(x), gc.OnnxRuntime(1).run(file, x), file


@pytest.mark.parametrize("scheme", [W7A8Dynamic, GROUPED], ids=lambda scheme: scheme.name)
def test_runtimes_give_what_pytorch_gives(scheme: gc.Scheme, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    expected, found, file = exported(scheme, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # 7-bit weights: no kernel overflows
    if gc.OpenVINO().available() is None:
        torch.testing.assert_close(gc.OpenVINO(1).run(file, tokens()), expected, rtol=1e-5, atol=1e-6)


def test_linear_layers_multiply_integers_and_share_their_inputs_codes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, _, file = exported(W7A8Dynamic, tmp_path)
    kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert kinds["MatMulInteger"] == 4 and not kinds.keys() & {"MatMul", "Gemm"}
    assert kinds["QuantizeLinear"] == 3  # query and key read one tensor
    weights = [list(t.dims) for t in onnx.load(file).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sorted(shape for shape in weights if len(shape) > 1) == [[8, 8, 1], [16, 32], [32, 8], [32, 32], [32, 32]]


def test_a_single_example_is_a_token(tmp_path: Path) -> None:
    """Rows [batch, features], whose layer exports as a Gemm."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    small = gc.compress(model, gc.Quantize(W7A8Dynamic), gc.Data()).model
    x = torch.randn(5, 16) * torch.tensor([1.0, 100.0, 0.0, 1.0, 1e-3])[:, None]
    found = gc.OnnxRuntime(1).run(gc.OnnxRuntime(1).export(small, x, tmp_path / "model.onnx"), x)
    with torch.no_grad():
        torch.testing.assert_close(found, small(x), rtol=1e-5, atol=1e-6)


def test_it_is_a_choice_beside_measured_ranges() -> None:
    """Also of a convolution, which takes the weight's format of it alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Linear(6, 4)).eval()
    data = gc.Data(calibration=[torch.randn(8, 8, 6) for _ in range(3)])
    narrow = gc.Scheme("W2A8-dynamic", Int(2), Int(8, PerToken()))
    result = gc.compress(model, gc.Quantize(to=gc.Bytes(0.9), options=(gc.W8A8, W8A8Dynamic, narrow)), data)
    rows = [row.name for row in result.report.steps[0].layers if row.action == "quantized"]
    assert rows == ["0", "2"]
