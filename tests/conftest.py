"""Makes the zoo importable as `nets`, keeps the user's cache out of the tests, and gives timed tests the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

#: How many processes share the machine, and whether this is one of several.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that is marked as timed waits until those of other processes have ended, and none begins until it has."""
    if WORKERS == 1:
        yield
        return
    fcntl = pytest.importorskip("fcntl")
    folder, timed = tmp_path_factory.getbasetemp().parent, request.node.get_closest_marker("timed") is not None
    with (folder / "next").open("w") as door, (folder / "running").open("w") as running:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        if not timed:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield
