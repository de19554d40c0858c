"""Export with evidence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gracile.compress import compress
from gracile.data import Data
from gracile.errors import GracileError, ModelError, TargetError
from gracile.export import export
from gracile.formats import W7A8, W8A8, MidRise, Scheme, Ternary
from gracile.steps import Quantize
from gracile.targets import OnnxRuntime, PyTorch

pytest.importorskip("onnxruntime")


def test_the_evidence_holds_parity_latency_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 3)).train(), torch.randn(8, 16)
    found = export(model, OnnxRuntime(threads=1), tmp_path / "deep" / "m.onnx", x, seconds=0.2)
    assert found.path == tmp_path / "deep" / "m.onnx"
    assert found.size_bytes == found.path.stat().st_size
    assert found.parity.max_error < 1e-5
    assert found.parity.agreement == 1.0
    assert list(found.latency) == ["pytorch", "onnxruntime"]
    assert found.latency["pytorch"].ratio == 1
    assert found.latency["onnxruntime"].batch_size == 8
    assert found.latency["onnxruntime"].precision == "f32"
    assert all(module.training for module in model.modules())
    data = json.loads(json.dumps(found.to_json()))
    assert data["parity"]["scale"] > 0
    assert data["latency"]["onnxruntime"]["p50_ms"] > 0


def test_feed_decides_what_the_model_sees(tmp_path: Path) -> None:
    model, batch = nn.Linear(4, 2).eval(), {"pixels": torch.randn(3, 4), "other": torch.zeros(3)}
    data = Data(feed=lambda batch: batch["pixels"])
    found = export(model, PyTorch(), tmp_path / "m.pt2", batch, data, seconds=0.1)
    assert found.parity.max_error == 0


class Gone(PyTorch):
    def available(self) -> str | None:
        return "its package is not installed: pip install gone"


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got int"):
        export(3, OnnxRuntime(), tmp_path / "m.onnx", x)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="expected a target"):
        export(nn.Linear(4, 2), "onnx", tmp_path / "m.onnx", x)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="Gone cannot be used here: its package is not installed"):
        export(nn.Linear(4, 2), Gone(), tmp_path / "m.onnx", x)
    with pytest.raises(GracileError):
        export(nn.Linear(4, 2), OnnxRuntime(), tmp_path / "m.onnx", torch.randn(3, 5))
    assert list(tmp_path.iterdir()) == []


def test_formats_without_kernels_are_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval(), torch.randn(8, 16)
    small = compress(model, Quantize(Ternary()), Data()).model
    found = export(small, OnnxRuntime(), tmp_path / "m.onnx", x, seconds=0.1)
    assert [note for note in found.notes if note.startswith("2 layers (Ternary per channel) are written as floating")]
    assert found.parity.max_error < 1e-5
    assert export(small, PyTorch(), tmp_path / "m.pt2", x, seconds=0.1).notes == ()  # which keeps the codes


@pytest.mark.parametrize("dot_product", [True, False])
def test_weights_that_overflow_here_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dot_product: bool
) -> None:
    monkeypatch.setattr(sys.modules[export.__module__], "has_int8_dot_product", lambda: dot_product)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval(), torch.randn(8, 16)
    odd = Scheme("odd", MidRise(7), W8A8.input)  # its levels take an eighth bit
    for scheme, told in ((W8A8, not dot_product), (odd, not dot_product), (W7A8, False)):
        small = compress(model, Quantize(scheme), Data(calibration=[x])).model
        found = export(small, PyTorch(), tmp_path / f"{scheme.name}.pt", x, seconds=0.1)
        assert [("2 layers" in note and "W7A8" in note) for note in found.notes] == [True] * told
        assert found.to_json()["notes"] == list(found.notes)
