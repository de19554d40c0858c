from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gracile.files import cache_directory
from gracile.steps.latency import cache as latency_cache
from gracile.steps.latency.cache import LatencyCache, identity_of
from gracile.targets import OnnxRuntime, PyTorch

IDENTITY = {"processor": "p", "batch": [["torch.float32", 2, 3]]}


def test_what_was_put_is_there_for_the_same_identity_only() -> None:
    LatencyCache(IDENTITY).put("conv", 8, 0.25)
    again = LatencyCache(IDENTITY)
    assert again.get("conv", 8) == 0.25 and again.notes == []
    assert again.get("conv", 16) is None and again.get("linear", 8) is None
    assert LatencyCache({**IDENTITY, "processor": "q"}).get("conv", 8) is None
    assert again.path.parent == cache_directory() / "latency"
    assert [path.name for path in again.path.parent.iterdir()] == [again.path.name], "nothing temporary is left"


def damage(cache: LatencyCache, change: Any) -> None:
    content = json.loads(cache.path.read_text())
    change(content)
    cache.path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(schema=99),
        lambda c: c["identity"].update(processor="another"),
        lambda c: c["shares"]["conv"].update({"8": "fast"}),
        lambda c: c["shares"]["conv"].update({"8": 3.0}),
        lambda c: c["shares"]["conv"].update({"8": float("nan")}),
        lambda c: c.pop("shares"),
        lambda c: c.update(shares=[1]),
    ],
    ids=["schema", "identity", "text", "no share", "nan", "missing", "list"],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_note_and_replaced(change: Any) -> None:
    cache = LatencyCache(IDENTITY)
    cache.put("conv", 8, 0.25)
    damage(cache, change)
    found = LatencyCache(IDENTITY)
    assert found.shares == {} and "measured again" in found.notes[0] and str(found.path) in found.notes[0]
    found.put("conv", 8, 0.5)
    assert LatencyCache(IDENTITY).get("conv", 8) == 0.5


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"[]"], ids=repr)
def test_what_is_no_json_object_is_ignored_too(content: bytes) -> None:
    cache = LatencyCache(IDENTITY)
    cache.put("conv", 8, 0.25)
    cache.path.write_bytes(content)
    assert len(LatencyCache(IDENTITY).notes) == 1


def test_a_folder_that_cannot_be_made_is_one_note_and_no_error(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache = LatencyCache(IDENTITY)
    cache.put("conv", 8, 0.25)
    cache.put("conv", 16, 0.5)
    assert cache.get("conv", 16) == 0.5
    assert len([note for note in cache.notes if "not kept" in note]) == 1


def test_the_cache_is_under_the_users_own(monkeypatch: Any) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    assert cache_directory() == Path("/home/someone/.cache/gracile")


def test_the_identity_holds_all_that_a_latency_depends_on(monkeypatch: Any) -> None:
    def identity(model: Any = None, target: Any = None, batch: Any = None) -> dict[str, Any]:
        batch = torch.zeros(2, 4) if batch is None else batch
        return identity_of(model or nn.Linear(4, 2), 8, target or OnnxRuntime(threads=1), batch)

    assert identity() == identity(), "weights do not count"
    same = json.dumps(identity(), sort_keys=True)
    others = [
        identity(nn.Linear(4, 3)),
        identity(nn.Sequential(nn.Linear(4, 2), nn.ReLU())),
        identity(target=OnnxRuntime(threads=2)),
        identity(target=PyTorch(threads=1)),
        identity(batch=torch.zeros(3, 4)),
        identity(batch=torch.zeros(2, 4, dtype=torch.float64)),
    ]
    monkeypatch.setattr(latency_cache, "cpu_model", lambda: "another processor")
    others.append(identity())
    monkeypatch.undo()
    monkeypatch.setattr(latency_cache, "package_version", lambda name: "0")
    others.append(identity())
    texts = {json.dumps(other, sort_keys=True) for other in others}
    assert len(texts) == len(others) and same not in texts
