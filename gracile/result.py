"""Result: a compressed model, the evidence, and everything needed to save it and load it elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gracile.artifact import JOURNAL, save_model
from gracile.errors import RunError
from gracile.files import write_directory
from gracile.report.model import Report
from gracile.surgery import Edit


@dataclass(frozen=True, eq=False)
class Result:
    """What `compress` and `optimize` return.

    model: of the class that was given. report: the evidence. met: whether the goal was met; None where there was none.
    edits: the journal, replayed on a fresh model by `load`. provenance: recipe, seed, versions, data fingerprint.
    exported: files for runtimes by the target's name.
    """

    model: nn.Module
    report: Report
    met: bool | None
    edits: tuple[Edit, ...]
    provenance: dict[str, Any] = field(repr=False)
    exported: Mapping[str, Path] = field(default_factory=dict)

    def save(self, directory: str | Path) -> Path:
        """Write the artifact: weights, journal, report (JSON and HTML) and exported models; atomically.

        An older artifact at `directory` stays until the new one is complete, which then takes its place. Raises
        RunError where the disk refuses, or where the directory holds something else, which is left alone.
        """
        directory = Path(directory)
        check_destination(directory)

        def fill(temporary: Path) -> None:
            save_model(self.model, temporary, self.edits, self.provenance)
            self.report.save(temporary)
            for name, path in self.exported.items():
                folder = temporary / "targets" / name
                folder.mkdir(parents=True)
                for file in sorted(path.parent.glob(f"{path.stem}.*")):
                    shutil.copy2(file, folder / file.name)

        write_directory(directory, fill)
        return directory


def check_destination(directory: str | Path) -> None:
    """Raise RunError if an artifact cannot be put at `directory`: something stands there that is not one."""
    path = Path(directory)
    if path.is_dir() and any(path.iterdir()) and not (path / JOURNAL).is_file():
        raise RunError(
            f"'{path}' is a directory with other things in it, which saving there would replace.\n"
            f"  Name a new directory, an empty one, or one with an earlier artifact."
        )
    if path.exists() and not path.is_dir():
        raise RunError(f"'{path}' is a file; an artifact is a directory.\n  Name another place.")
