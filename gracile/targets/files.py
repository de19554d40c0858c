"""Files that are whole or absent: written beside the final name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gracile.errors import TargetError


def write_whole(path: Path, write: Callable[[str], None]) -> Path:
    """Let `write` fill a temporary file in the folder of `path`, then rename it; raises TargetError where it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error}.\n  Free some space or choose another path.") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    return path
