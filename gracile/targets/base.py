"""What a target is: a runtime that exports, loads and runs a model, and says what it can execute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gracile.data import Batch

#: What ONNX kernels of both runtimes execute: 8-bit integers where inputs are on a grid (codes of fewer bits are
#: widened), and weights of 4 and 8 bits decoded inside the kernel where they are not.
INTEGER_SCHEMES = ("W8A8", "W7A8", "W4A8", "W3A8", "W2A8", "W4A4", "W3A3", "W2A2", "W8A16", "W4A16", "W3A16", "W2A16")


@dataclass(frozen=True)
class Capabilities:
    """What a runtime executes, as data.

    schemes: names of schemes it runs as integers ("W8A8", "W8A16", "W4A16"); others are storage only there.
    precisions: its own precision modes that a plan may try ("f32", "bf16", ...), the first being forced float32.
    folds_batch_norm: whether a batch norm after a convolution is folded into it on export.
    integer_lstms: whether it has an LSTM of integers that rounds inputs and states as they come.
    """

    schemes: tuple[str, ...]
    precisions: tuple[str, ...] = ("f32",)
    folds_batch_norm: bool = True
    integer_lstms: bool = False


class Runner(ABC):
    """A model loaded in a runtime: call it with a batch, get outputs as torch tensors on the CPU.

    A tensor is the one input; of a tuple, the first as many items as the model has inputs; of a dict, the items named
    as its inputs. One output comes back as a tensor, several as an `Outputs` (by name, by attribute or by position).
    """

    @abstractmethod
    def __call__(self, batch: Batch) -> Any: ...


class Target(ABC):
    """A runtime. Members are frozen dataclasses; `name` and `suffix` are class constants."""

    name: str
    suffix: str
    capabilities: Capabilities

    @abstractmethod
    def available(self) -> str | None:
        """None where the runtime can be used here; else why not and what to install."""

    @abstractmethod
    def export(
        self, model: nn.Module, example: Batch, path: str | Path, *, feed: Callable[[Batch], Any] | None = None
    ) -> Path:
        """Write the model for this runtime and return the file; raises TargetError with the reason where it cannot."""

    @abstractmethod
    def load(self, path: str | Path) -> Runner:
        """The exported model, ready to run."""

    def run(self, path: str | Path, batch: Batch) -> Any:
        """Outputs of the exported model on one batch."""
        return self.load(path)(batch)


class Outputs(dict[str, Any]):
    """Several named outputs, read by name, by attribute or by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)
