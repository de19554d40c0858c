"""Killed with -9 at random points, the same command goes on and ends with the same bits; no finished step is redone.

Also: a disk that is full while saving is one clear error, and what was there before is intact.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gracile as gc
from gracile.files import sha256_file

SCRIPT = Path(__file__).with_name("resumable_run.py")
LONGEST = 300.0  # seconds that any one process may take: it takes some 5, and machines differ


class Run:
    """One run directory, and the processes that work on it one after another."""

    def __init__(self, mode: str, folder: Path) -> None:
        folder.mkdir()
        self.mode, self.folder, self.log, self.out = mode, folder / "run", folder / "log", folder / "out.json"
        self.kept: dict[str, tuple[int, int]] = {}

    def start(self, die_at: int | None = None) -> subprocess.Popen[bytes]:
        """The same command every time; `die_at` as in the script."""
        environment = {**os.environ, "PYTHONPATH": str(Path(gc.__file__).resolve().parents[1])}
        if die_at is not None:
            environment["GRACILE_DIE_AT"] = str(die_at)
        command = [sys.executable, str(SCRIPT), self.mode, str(self.folder), str(self.log), str(self.out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def begun(self) -> int:
        """How many processes have begun to work, their imports being done."""
        return self.log.read_text().count('["begun"]') if self.log.exists() else 0

    def kill_after(self, seconds: float) -> bool:
        """Start, and kill when it has worked this long; False where it was done before."""
        before, process = self.begun(), self.start()
        deadline = time.monotonic() + LONGEST
        while self.begun() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        return self.ended(process)

    def kill_at_rename(self, count: int) -> bool:
        """Start, and let it kill itself around the count-th rename; False where it was done before."""
        return self.ended(self.start(die_at=count))

    def finish(self) -> None:
        """Start, and let it come to its end."""
        assert not self.ended(self.start())

    def ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it was killed; any other end but success is a failure. Checks what it left."""
        _, said = process.communicate(timeout=LONGEST)
        assert process.returncode in (0, -signal.SIGKILL), said.decode()[-2000:]
        self.check_nothing_was_redone()
        return process.returncode != 0

    def check_nothing_was_redone(self) -> None:
        """Files of finished steps and decisions are the same, untouched, but for steps that two later ones follow."""
        found = finished_files(self.folder)
        for path, identity in self.kept.items():
            if path in found:
                assert found[path] == identity, f"{path} was written again"
            else:
                step = Path(path).parent
                later = [int(p.name) for p in step.parent.iterdir() if p.name.isdigit()]
                assert step.parent.name == "steps" and max(later) >= int(step.name) + 2, f"{path} is gone"
        self.kept = found
        acts = Counter(self.log.read_text().splitlines())
        acts.pop('["begun"]')
        assert not [act for act, times in acts.items() if times > 1]

    @property
    def outcome(self) -> dict[str, Any]:
        return dict(json.loads(self.out.read_text()))


def finished_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> inode and time of change, of every file of a finished step or a decision."""
    files = [*folder.rglob("steps/[0-9][0-9]/*"), *folder.rglob("decisions/[!.]*"), *folder.rglob("run.json")]
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """Outcome and seconds of work of a whole run, by mode."""
    outcomes = {}
    for mode in ("optimize", "compress"):
        run = Run(mode, tmp_path_factory.mktemp("whole") / mode)
        process = run.start()
        while not run.begun() and process.poll() is None:
            time.sleep(0.01)
        start = time.monotonic()
        assert not run.ended(process)
        outcomes[mode] = (run.outcome, time.monotonic() - start)
    return outcomes


def kill_and_resume(mode: str, kills: int, seed: int, whole: tuple[dict[str, Any], float], folder: Path) -> None:
    """Kill so often, at random times and around random renames, over as many runs as that takes; all end alike."""
    chance = random.Random(seed)
    expected, seconds = whole
    runs = [Run(mode, folder / "0")]
    done = 0
    while done < kills:
        run = runs[-1]
        killed = (
            run.kill_at_rename(chance.randint(1, 6))
            if done % 3 == 2
            else run.kill_after(chance.uniform(0, 0.6 * seconds))
        )
        done += killed
        if not killed:
            assert run.outcome == expected
            runs.append(Run(mode, folder / str(len(runs))))
    runs[-1].finish()
    assert runs[-1].outcome == expected


@pytest.mark.parametrize("mode", ["optimize", "compress"])
def test_killed_three_times_it_ends_with_the_same_weights(mode: str, uninterrupted: Any, tmp_path: Path):
    kill_and_resume(mode, 3, 0, uninterrupted[mode], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["optimize", "compress"])
def test_killed_twenty_times_it_ends_with_the_same_weights(mode: str, uninterrupted: Any, tmp_path: Path):
    kill_and_resume(mode, 20, 1, uninterrupted[mode], tmp_path)


def test_a_run_that_is_done_is_read_and_not_made_again(uninterrupted: Any, tmp_path: Path):
    run = Run("optimize", tmp_path / "run")
    run.finish()
    acts = run.log.read_text().splitlines()
    run.finish()
    assert run.log.read_text().splitlines() == [*acts, '["begun"]']
    assert run.outcome == uninterrupted["optimize"][0]


class Wide(nn.Module):
    """A net of 1.2 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(300, 1000), nn.Linear(1000, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def check_full_disk(folder: Path, fill: Any, free: Any) -> None:
    """An artifact there is intact after a save that the disk refuses, and the next one succeeds when there is room."""
    torch.manual_seed(0)
    model = Wide()
    first = gc.compress(model, gc.Quantize(gc.W8A16))
    second = gc.compress(model, gc.Prune(0.5))
    first.save(folder / "artifact")
    before = contents(folder / "artifact")
    fill()
    with pytest.raises(gc.RunError) as caught:
        second.save(folder / "artifact")
    message = str(caught.value)
    assert "artifact" in message and "untouched" in message and "Free some space" in message
    assert "No space left" in message
    assert len(message.splitlines()) <= 3
    assert contents(folder / "artifact") == before
    loaded = gc.load(folder / "artifact", Wide())
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in first.model.state_dict().items())
    free()
    assert sorted(p.name for p in folder.iterdir()) == ["artifact"], "half-written files are left behind"
    second.save(folder / "artifact")
    assert contents(folder / "artifact") != before


@pytest.mark.parametrize("written", ["the weights", "the journal", "the report"])
def test_no_space_left_while_saving(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "the weights": ("gracile.artifact.save_file", refuse),
        "the journal": ("pathlib.Path.write_text", refuse),
        "the report": ("gracile.report.model.Report.save", refuse),
    }[written]
    check_full_disk(tmp_path, lambda: monkeypatch.setattr(*place), monkeypatch.undo)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 4 MB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_while_saving(small_disk: Path, tmp_path: Path):
    ballast = small_disk / "ballast"

    def fill() -> None:
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - 500_000))  # the weights alone are 1.2 MB

    check_full_disk(small_disk, fill, ballast.unlink)


def test_a_really_full_disk_while_a_run_goes_on(small_disk: Path):
    """The finished step stays; with room again, the same call goes on from it."""
    torch.manual_seed(0)
    model = Wide()
    recipe = gc.Recipe(gc.Prune(0.5), gc.Quantize(gc.W8A16))
    wanted = gc.compress(model, recipe)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_700_000))  # room for one step of 1.2 MB and not for the 0.3 MB of the next
    with pytest.raises(gc.RunError, match="No space left"):
        gc.compress(model, recipe, run_dir=small_disk / "run")
    step = small_disk / "run" / "steps" / "00"
    assert step.is_dir()
    before = finished_files(small_disk)
    ballast.unlink()
    result = gc.compress(model, recipe, run_dir=small_disk / "run")
    assert all(torch.equal(t, wanted.model.state_dict()[n]) for n, t in result.model.state_dict().items())
    after = finished_files(small_disk)
    assert all(after[path] == identity for path, identity in before.items())
