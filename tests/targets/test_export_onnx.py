"""Exporting: names, dynamic sizes, silence, files, and models that cannot be exported."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gracile.errors import MissingExtraError, ModelError, TargetError
from gracile.targets import OnnxRuntime
from gracile.targets.onnxruntime import OnnxRuntimeRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Two(nn.Module):
    """Two inputs, one straight through; a dict of outputs, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.line(left) + (0 if right is None else right)
        return {"logits": logits, "left_again": left, "logits_again": logits}


def runner(path: Path) -> OnnxRuntimeRunner:
    return OnnxRuntime(1).load(path)


def test_ends_are_named_as_the_forward_names_them(tmp_path: Path) -> None:
    model, batch = Two().eval(), {"right": torch.ones(3, 4), "left": torch.randn(3, 4), "labels": torch.zeros(3)}
    run = runner(OnnxRuntime().export(model, batch, tmp_path / "m.onnx"))
    assert sorted(run.inputs) == ["left", "right"]
    assert run.outputs == ["logits", "left_again", "logits_again"]
    found = run(batch)
    torch.testing.assert_close(found.logits, model.line(batch["left"]) + 1)
    assert torch.equal(found["left_again"], batch["left"])
    assert torch.equal(found[2], found.logits)


def test_a_tuple_batch_leaves_its_target_out(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    run = runner(OnnxRuntime().export(model, (x, torch.zeros(3)), tmp_path / "m.onnx"))
    assert run.inputs == ["input"]
    assert run.outputs == ["output"]
    torch.testing.assert_close(run((x, torch.zeros(3))), model(x))


@pytest.mark.parametrize("example_size", [1, 3])
def test_any_batch_size_runs_whatever_the_examples(tmp_path: Path, example_size: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2)).eval()
    run = runner(OnnxRuntime().export(model, torch.randn(example_size, 2, 6, 6), tmp_path / "m.onnx"))
    for size in (1, 2, 5):
        x = torch.randn(size, 2, 6, 6)
        torch.testing.assert_close(run(x), model(x))


def test_tokens_may_be_longer_or_shorter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval()
    run = runner(OnnxRuntime().export(model, torch.randint(0, 9, (2, 6)), tmp_path / "m.onnx"))
    ids = torch.randint(0, 9, (3, 11))
    torch.testing.assert_close(run(ids), model(ids))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(float(int(x.shape[0]))).reshape(4, 1)


def test_a_model_that_fixes_its_batch_is_exported_for_that_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="gracile"):
        run = runner(OnnxRuntime().export(FixedBatch(), torch.ones(4, 2), tmp_path / "m.onnx"))
    assert "FixedBatch exports only for batches of 4" in caplog.text
    assert torch.equal(run(torch.ones(4, 2)), FixedBatch()(torch.ones(4, 2)))
    for size in (1, 5):  # one row would broadcast silently to four
        with pytest.raises(TargetError, match="ONNX Runtime cannot run this batch"):
            run(torch.ones(size, 2))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double().train()
    state = copy.deepcopy(model.state_dict())
    example = torch.randn(8, 4)
    OnnxRuntime().export(model, example, tmp_path / "m.onnx")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_exporting_is_quiet_and_leaves_logging_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {name: logging.getLogger(name).level for name in ("torch.onnx", "torch.export", "onnxscript")}
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OnnxRuntime().export(nn.Linear(4, 2), torch.randn(3, 4), tmp_path / "m.onnx")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert caught == []
    assert before == {name: logging.getLogger(name).level for name in before}
    assert warnings.filters == filters


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1] + float(x.sum().item() > 0)


def test_what_cannot_be_exported_says_why_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"Sorting cannot be exported to ONNX: .+"):
        OnnxRuntime().export(Sorting(), torch.randn(3, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_run_on_the_example_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear does not run on the example"):
        OnnxRuntime().export(nn.Linear(4, 2), torch.randn(3, 5), tmp_path / "m.onnx")


def test_an_absent_exporter_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gracile\[onnxruntime\]'"):
        OnnxRuntime().export(nn.Linear(4, 2), torch.randn(3, 4), tmp_path / "m.onnx")


def test_an_earlier_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")

    def full(model: object, file: str, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(TargetError, match="No space left on device"):
        OnnxRuntime().export(nn.Linear(4, 2), torch.randn(3, 4), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_in_the_file_that_only_a_debugger_reads(tmp_path: Path) -> None:
    path = OnnxRuntime().export(nn.Linear(64, 64), torch.randn(3, 64), tmp_path / "m.onnx")
    model = onnx.load(path)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert path.stat().st_size < 64 * 65 * 4 + 2000
    used = {name for node in model.graph.node for name in node.input}
    assert {value.name for value in model.graph.initializer} <= used
