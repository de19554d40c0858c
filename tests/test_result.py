from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
from gracile import artifact
from gracile.report.model import Report
from gracile.result import Result


def result(**changes: Any) -> Result:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(3, 2)),
        "report": Report(title="A title"),
        "met": None,
        "edits": (),
        "provenance": {"seed": 1},
    }
    return Result(**(settings | changes))


def test_an_artifact_holds_weights_journal_report_and_exported_files(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "other.txt"):
        (folder / name).write_text(name)
    made = result(exported={"onnxruntime": folder / "model.onnx"})
    assert made.save(tmp_path / "slim") == tmp_path / "slim"
    files = {str(p.relative_to(tmp_path / "slim")) for p in (tmp_path / "slim").rglob("*") if p.is_file()}
    assert files >= {
        "model.safetensors",
        "compression.json",
        "report.json",
        "targets/onnxruntime/model.onnx",
        "targets/onnxruntime/model.onnx.data",
    }
    assert "targets/onnxruntime/other.txt" not in files
    assert json.loads((tmp_path / "slim" / "report.json").read_text())["title"] == "A title"
    loaded = gc.load(tmp_path / "slim", nn.Sequential(nn.Linear(3, 2)))
    assert torch.equal(loaded[0].weight, made.model[0].weight)  # type: ignore[index]


def test_saving_again_replaces_the_artifact_and_nothing_else(tmp_path: Path) -> None:
    result().save(tmp_path / "slim")
    (tmp_path / "slim" / "stale").write_text("x")
    result(provenance={"seed": 2}).save(str(tmp_path / "slim"))
    assert artifact.read_journal(tmp_path / "slim")["provenance"] == {"seed": 2}
    assert not (tmp_path / "slim" / "stale").exists() and os.listdir(tmp_path) == ["slim"]


def test_other_things_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    (tmp_path / "model.pt").write_text("weights")
    for place in ("work", "model.pt"):
        with pytest.raises(gc.RunError):
            result().save(tmp_path / place)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    assert (tmp_path / "model.pt").read_text() == "weights"
    (tmp_path / "empty").mkdir()
    result().save(tmp_path / "empty")


@pytest.mark.parametrize("where", ["model.safetensors", "report.json"])
def test_a_disk_that_refuses_leaves_the_earlier_artifact_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    result().save(tmp_path / "slim")
    before = {p.name: p.read_bytes() for p in (tmp_path / "slim").iterdir() if p.is_file()}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "report.json":
        monkeypatch.setattr(Report, "save", refuse)
    else:
        monkeypatch.setattr(artifact, "save_file", refuse)
    with pytest.raises(gc.RunError, match=r"No space left on device[\s\S]*Free some space"):
        result(provenance={"seed": 2}).save(tmp_path / "slim")
    assert {p.name: p.read_bytes() for p in (tmp_path / "slim").iterdir() if p.is_file()} == before
    assert os.listdir(tmp_path) == ["slim"]
