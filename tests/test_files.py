from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gracile.errors import RunError
from gracile.files import sha256_file, sha256_json, write_bytes, write_directory, write_json


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_bytes_and_json_are_written_and_folders_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    write_json(file, {"b": 1, "a": [1.5, None]})
    assert json.loads(file.read_text()) == {"a": [1.5, None], "b": 1}
    write_bytes(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    assert os.listdir(file.parent) == ["x.json"]


def test_what_is_written_can_be_read_by_whom_a_plain_file_can(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write_bytes(tmp_path / "file", b"")
    write_directory(tmp_path / "made", lambda temporary: None)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = tmp_path / "x"
    write_bytes(file, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(broken, refuse)
    with pytest.raises(RunError, match="No space left on device") as caught:
        write_bytes(file, b"new")
    monkeypatch.undo()
    assert str(file) in str(caught.value) and "Free some space" in str(caught.value)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_earlier_file_and_directory(tiny_disk: Path) -> None:
    write_bytes(tiny_disk / "x", b"old")
    write_directory(tiny_disk / "d", lambda folder: (folder / "y").write_bytes(b"old") and None)
    with pytest.raises(RunError, match="No space left on device"):
        write_bytes(tiny_disk / "x", bytes(100_000))
    with pytest.raises(RunError, match="No space left on device"):
        write_directory(tiny_disk / "d", lambda folder: (folder / "y").write_bytes(bytes(100_000)) and None)
    assert (tiny_disk / "x").read_bytes() == (tiny_disk / "d" / "y").read_bytes() == b"old"
    assert sorted(os.listdir(tiny_disk)) == ["d", "x"]


def test_a_directory_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    for content in ("first", "second"):
        write_directory(tmp_path / "d", lambda folder, c=content: (folder / c).write_text(c) and None)  # type: ignore[misc]
        assert os.listdir(tmp_path / "d") == [content]
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("ours"), KeyboardInterrupt()], ids=repr)
def test_a_directory_that_cannot_be_filled_leaves_the_earlier_one(tmp_path: Path, error: BaseException) -> None:
    write_directory(tmp_path / "d", lambda folder: (folder / "x").write_text("old") and None)

    def fill(folder: Path) -> None:
        (folder / "x").write_text("new")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        write_directory(tmp_path / "d", fill)
    assert (tmp_path / "d" / "x").read_text() == "old" and os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_brings_the_earlier_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write_directory(tmp_path / "d", lambda folder: (folder / "x").write_text("old") and None)
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EACCES, "not allowed")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError, match="not allowed"):
        write_directory(tmp_path / "d", lambda folder: (folder / "x").write_text("new") and None)
    assert (tmp_path / "d" / "x").read_text() == "old" and os.listdir(tmp_path) == ["d"]


def test_a_place_that_is_no_directory_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_bytes(p, b""), lambda p: write_directory(p, lambda folder: None)):
        with pytest.raises(RunError, match="Could not write"):
            write(tmp_path / "file" / "x")


def test_the_present_directory_can_be_written_where_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_directory(".", lambda folder: (folder / "x").write_text("new") and None)
    assert (tmp_path / "here" / "x").read_text() == "new"


def test_digests(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert sha256_json({"b": 1, "a": (2,)}) == sha256_json({"a": [2], "b": 1}) != sha256_json({"a": [2], "b": 2})
