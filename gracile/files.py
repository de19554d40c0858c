"""Files written whole or not at all: to a temporary name first, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gracile.errors import RunError


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Could not write '{path}': {error.strerror or error}.\n"
            f"  What was there before is untouched. Free some space or choose another place, then run it again."
        ) from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part. Raises RunError."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            with open(temporary, "xb") as file:  # not tempfile, whose files are for their owner alone
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def cache_directory() -> Path:
    """Where measurements that can be made again are kept, for this user and machine.

    $XDG_CACHE_HOME/gracile, else %LOCALAPPDATA%\\gracile on Windows, else ~/.cache/gracile. Not created here.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA" if os.name == "nt" else "", "")
    return (Path(base) if base else Path.home() / ".cache") / "gracile"


def write_directory(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Make a directory atomically: `fill` writes into a temporary one, which then takes the place of `path`.

    An older directory at `path` stays as it was until the new one is complete, and if `fill` fails. Raises RunError
    for what the disk refuses.
    """
    path = Path(os.path.abspath(path))  # also where it is "."
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, old = _beside(path), _beside(path)
        try:
            temporary.mkdir()
            fill(temporary)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _beside(path: Path) -> Path:
    """A new hidden name in the same directory, hence on the same disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(data: Any) -> str:
    """SHA-256 of data as canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
