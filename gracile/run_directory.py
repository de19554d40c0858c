"""A run directory: every finished step on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile import artifact
from gracile.data import Data
from gracile.errors import RunError
from gracile.files import sha256_json, write_json
from gracile.report.model import Report, StepRecord
from gracile.surgery import Edit, edit_from_json


class RunDirectory:
    """Finished steps of one run, by number; and named decisions of a search."""

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        """Open or create. identity: what makes it this run (model, recipe, data, seed); another's raises RunError."""
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"'{self.path}' is a file; a run directory is a directory.\n  Name another place.")
        file = self.path / "run.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text())
            except ValueError as error:
                raise RunError(f"'{file}' cannot be read: {error}.\n  Use another run directory.") from error
            known = found if isinstance(found, dict) else {}
            changed = sorted(k for k in identity if known.get(k) != identity[k])
            if changed:
                raise RunError(
                    f"The run directory '{self.path}' belongs to another run: {', '.join(changed)} differ.\n"
                    f"  Use another directory, or delete this one to start afresh."
                )
            for left in self.path.glob("steps/.*"):  # half-written when the run was killed
                shutil.rmtree(left, ignore_errors=True)
        else:
            write_json(file, identity)

    def step_directory(self, index: int) -> Path:
        """Where an unfinished step keeps its own checkpoints."""
        return self.path / "work" / f"{index:02d}"

    def finish_step(self, index: int, model: nn.Module, edits: list[Edit], records: list[StepRecord]) -> None:
        """Save the model after a step with the records so far; the step's own checkpoints go."""
        stored = Report(title="", steps=tuple(records)).to_json()["steps"]
        artifact.save(model, self._finished(index), edits, {"records": stored})
        shutil.rmtree(self.step_directory(index), ignore_errors=True)
        shutil.rmtree(self._finished(index - 2), ignore_errors=True)  # the last two are enough to go on

    def finished_steps(self) -> int:
        """How many steps are done; the model after the last of them is on disk."""
        folder = self.path / "steps"
        done = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        return max(done, default=-1) + 1

    def restore(self, index: int, model: nn.Module) -> tuple[list[Edit], list[StepRecord]]:
        """Bring the model that the run began with to the state after a step; all edits and all records so far."""
        modes = {name: module.training for name, module in model.named_modules()}
        applied = len(getattr(model, "gracile_edits", ()))  # of an earlier compression, which the journal holds too
        journal = artifact.load_into(model, self._finished(index), applied)
        for name, module in model.named_modules():
            module.training = modes.get(name, model.training)
        report = Report.from_json({**Report(title="").to_json(), "steps": journal["provenance"]["records"]})
        return [edit_from_json(e) for e in journal["edits"]], list(report.steps)

    def decision(self, name: str) -> Any:
        """What was decided or measured under a name, or None."""
        file = self.path / "decisions" / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def decide(self, name: str, value: Any) -> None:
        """Keep a decision, or a measurement that decisions rest on, so that a resumed run does not make it again."""
        write_json(self.path / "decisions" / f"{name}.json", value)

    def _finished(self, index: int) -> Path:
        return self.path / "steps" / f"{index:02d}"


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def fingerprint_data(data: Data) -> dict[str, str]:
    """SHA-256 of the first batch of each role, drawn under a fixed random seed."""
    prints = {}
    with torch.random.fork_rng(devices=[]):
        for role in ("calibration", "train", "evaluation"):
            torch.manual_seed(0)
            batches = getattr(data, role)
            if batches is None:
                continue
            leaves = torch.utils._pytree.tree_leaves(next(iter(batches), None))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            parts = [
                [
                    str(t.dtype),
                    list(t.shape),
                    hashlib.sha256(_bytes(t)).hexdigest(),
                ]
                for t in tensors
            ]
            prints[role] = sha256_json(parts)
    return prints


def _bytes(tensor: Tensor) -> bytes:
    """A tensor's memory, of any dtype; NumPy lacks some."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
