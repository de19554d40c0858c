"""Layers and blocks that a solver is done with, kept on disk, so that an interrupted step goes on behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gracile.files import write_bytes


class FinishedParts:
    """Parts of a model, one file for each in the order in which they are solved; nowhere where there is no directory.

    A part is the state of a few modules and the numbers that go with it, as plain data.
    """

    def __init__(self, directory: Path | None, phase: str) -> None:
        """directory: of a step's own checkpoints. phase: tells the parts of one pass over the model from another's."""
        self._folder = None if directory is None else directory / phase

    def restore(self, part: str, index: int, model: nn.Module, modules: list[str]) -> dict[str, Any] | None:
        """Bring these modules to the state that was kept for a part, and return its numbers.

        None where nothing was kept, or what was does not fit the modules.
        """
        path = self._path(index)
        if path is None or not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads(file.metadata()["part"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: t.shape for key, t in tensors.items()}
        if metadata["part"] != part or shapes != {key: t.shape for key, t in _tensors(model, modules).items()}:
            return None
        for name in modules:
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            model.get_submodule(name).load_state_dict(state)
        numbers: dict[str, Any] = metadata["numbers"]
        return numbers

    def keep(self, part: str, index: int, model: nn.Module, modules: list[str], numbers: dict[str, Any]) -> None:
        """Write the state that these modules have now."""
        path = self._path(index)
        if path is None:
            return
        tensors = {
            key: t.detach().clone().contiguous() for key, t in _tensors(model, modules).items()
        }  # tied ones apart
        content = to_bytes(tensors, metadata={"part": json.dumps({"part": part, "numbers": numbers})})
        write_bytes(path, content)

    def _path(self, index: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{index:05d}.safetensors"


def states_of(model: nn.Module, modules: list[str]) -> dict[str, dict[str, Tensor]]:
    """Copies of the states of some modules."""
    return {
        name: {key: value.detach().clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in modules
    }


def _tensors(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    return {f"{name}/{key}": t for name in modules for key, t in model.get_submodule(name).state_dict().items()}
