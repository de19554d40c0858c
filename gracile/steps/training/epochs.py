"""What the epochs of a training leave behind: which of them is kept, and what an interrupted run goes on from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gracile.files import write_bytes

#: Held-out batches from which on their spread tells the noise of the difference between two epochs.
FEWEST = 8


class Epochs:
    """The model, the optimizer, the weights of the best epoch so far, the held-out losses.

    The best epoch is the one of the lowest held-out loss, the start being epoch 0. The last one is kept in its place if
    it is better than the start and its loss above the lowest by no more than one standard error of their difference
    over the held-out batches: as the learning rate falls an epoch is better than those before it unless something
    speaks against that, and the lowest of many noisy losses is low by chance too. Source: the one-standard-error rule
    of Breiman et al. 1984 (Classification and Regression Trees, section 3.4.3), here for paired differences.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path | None) -> None:
        self.model, self.optimizer, self.directory = model, optimizer, directory
        self.history: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.lowest = self.last = torch.empty(0, dtype=torch.float64)  # losses of the best epoch and of the last one

    def finish_epoch(self, losses: Tensor) -> None:
        """losses: [held-out batches] float64, whose mean is the epoch's; without any, the last epoch is the best."""
        loss = _mean(losses)
        if not self.history or math.isinf(loss) or loss < _lowest(self.history):
            self.best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            self.lowest = losses
        self.history.append(loss)
        self.last = losses
        if self.directory is not None and len(self.history) > 1:
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"best.{k}": v for k, v in self.best.items()}
            tensors |= {"losses.lowest": self.lowest, "losses.last": self.last}
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
            content = to_bytes(
                {k: v.detach().clone().contiguous() for k, v in tensors.items()},
                metadata={"history": json.dumps([None if math.isinf(x) else x for x in self.history])},
            )
            write_bytes(self.directory / "epochs.safetensors", content)

    def resume(self) -> None:
        """Go back to where the last epoch that was saved in the directory ended, if there is one."""
        path = self.directory / "epochs.safetensors" if self.directory is not None else None
        if path is None or not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            self.history = [math.inf if x is None else x for x in json.loads(file.metadata()["history"])]
        parts: dict[str, dict[str, Any]] = {"model": {}, "best": {}, "losses": {}, "optimizer": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.best = parts["best"]
        self.lowest, self.last = parts["losses"]["lowest"], parts["losses"]["last"]
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def restore_best(self) -> int:
        """Put the best weights into the model and return their epoch."""
        last = len(self.history) - 1
        if self._last_is_as_good():
            return last
        self.model.load_state_dict(self.best)
        if math.isinf(self.history[-1]):
            return last
        lowest = _lowest(self.history)
        return self.history.index(lowest) if lowest < math.inf else 0

    def _last_is_as_good(self) -> bool:
        """Whether the last epoch, which the model still holds, beats the start and is within noise of the best."""
        if len(self.last) < FEWEST or not self.history[-1] < self.history[0]:
            return False
        above = self.last - self.lowest
        return bool(above.mean() <= above.std() / math.sqrt(len(above)))


def _mean(losses: Tensor) -> float:
    """NaN where it is not finite, so that this epoch never wins; infinity without losses, so that the last one does."""
    if not len(losses):
        return math.inf
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.nan


def _lowest(losses: list[float]) -> float:
    """The lowest that is a number; infinity where none is."""
    return min((x for x in losses if not math.isnan(x)), default=math.inf)
