"""LSTMs in integers: what the file computes, weight by weight and beside PyTorch, and where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.environment import has_int8_dot_product
from gracile.formats import W7A8Dynamic, W8A8Dynamic

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SCHEME = W8A8Dynamic if has_int8_dot_product() else W7A8Dynamic


class Speech(nn.Module):
    """Frames through a recurrent layer; its outputs and states."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(6, batch_first=True, **({"hidden_size": 8} | settings))  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, states = self.rnn(x)
        return y, states[0].transpose(0, 1)


def compressed(net: nn.Module, scheme: gc.Scheme = SCHEME) -> nn.Module:
    return gc.compress(net.eval(), gc.Quantize(scheme), gc.Data(calibration=[torch.randn(4, 10, 6)])).model


SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"hidden_size": 64},  # the exporter leaves the order of larger weights' gates to the file
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_onnx_runtime_computes_what_pytorch_does(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, target = compressed(Speech(**settings)), gc.OnnxRuntime(threads=1)
    path = target.export(model, torch.randn(4, 10, 6), tmp_path / "model.onnx")
    nodes = [node for node in onnx.load(path).graph.node if "LSTM" in node.op_type]
    assert {node.op_type for node in nodes} == {"DynamicQuantizeLSTM"}
    assert len(nodes) == settings.get("num_layers", 1)
    for count in (1, 5):  # of any batch
        x = torch.randn(count, 10, 6)
        with torch.no_grad():
            expected = model(x)
        for found, wanted in zip(target.run(path, x).values(), expected, strict=True):
            # float32 sums in another order put few values into a neighbouring code
            assert float((found - wanted).abs().median()) < 1e-6
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scheme", [W7A8Dynamic, SCHEME], ids=["W7A8", "of this processor"])
def test_the_file_holds_integers_of_the_model(tmp_path: Path, scheme: gc.Scheme) -> None:
    torch.manual_seed(0)
    model = compressed(Speech(), scheme)
    path = gc.OnnxRuntime().export(model, torch.randn(4, 10, 6), tmp_path / "model.onnx")
    graph = onnx.load(path).graph
    held = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    (node,) = [node for node in graph.node if node.op_type == "DynamicQuantizeLSTM"]
    codes, scale = held[node.input[1]], held[node.input[8]]  # [1, in, 4 · hidden], [1, 4 · hidden]
    assert codes.dtype == torch.int8 and bool((scale > 0).all())
    gates = model.rnn.weight_ih_l0.view(4, 8, 6)  # type: ignore[union-attr,operator]
    order = torch.cat([gates[0], gates[3], gates[1], gates[2]])  # input, output, forget, cell
    torch.testing.assert_close((codes[0].float() * scale[0]).T, order)
    assert not any(t.dtype == torch.float32 and t.ndim == 3 for t in held.values())  # none of the float weights is left


def test_other_runtimes_get_decoded_weights_and_say_so(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, x = compressed(Speech()), torch.randn(4, 10, 6)
    for target in (gc.OpenVINO(), gc.PyTorch()):
        evidence = gc.export(model, target, tmp_path / f"model{target.suffix}", x, seconds=0.01)
        assert evidence.parity.max_error < 0.02 * evidence.parity.scale  # inputs and states in floating point
        assert any("decoded in the file" in note for note in evidence.notes)
        assert any("rounded to 8 bits in PyTorch, not in the file" in note for note in evidence.notes)
    evidence = gc.export(model, gc.OnnxRuntime(), tmp_path / "model.onnx", x, seconds=0.01)
    assert evidence.notes == ()


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_other_recurrent_layers_stay_decoded(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Net(Speech):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, state = self.rnn(x)
            return y, state.transpose(0, 1)

    model, x = compressed(Net(kind)), torch.randn(4, 10, 6)
    evidence = gc.export(model, gc.OnnxRuntime(), tmp_path / "model.onnx", x, seconds=0.01)
    assert evidence.parity.max_error < 1e-5
    assert any("decoded in the file" in note for note in evidence.notes)
