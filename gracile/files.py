"""Files written whole or not at all: to a temporary name first, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
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
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def write_directory(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Make a directory atomically: `fill` writes into a temporary one, which then takes the place of `path`.

    An older directory at `path` stays as it was until the new one is complete, and if `fill` fails. Raises RunError
    for what the disk refuses.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            fill(temporary)
            os.chmod(temporary, 0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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
