"""Context: everything a step is given besides the model it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracile.data import Data


@dataclass(frozen=True)
class Progress:
    """How far a phase is: `done` of `total` (None: unknown), with a short note such as a loss."""

    phase: str
    done: int
    total: int | None
    note: str = ""


@dataclass(frozen=True)
class Context:
    """What a step reads besides the model; never changed by a step.

    data: calibration, training and evaluation batches.
    original: the model as it was given, in eval mode and never changed: the reference of repairs and parity.
    teacher: the model to distil from; the original unless the user gave another.
    seed: all randomness of a step derives from it through `generator`.
    run_seed: of what all steps of a run have in common, such as the examples held out; None: `seed`.
    select: which layers are to be touched; None: all (see gracile.select).
    target: the runtime the model is meant for, or None.
    directory: where a step may keep its own checkpoints, or None.
    on_progress: called with a Progress, or None.
    """

    data: Data
    original: nn.Module
    teacher: nn.Module
    seed: int = 0
    run_seed: int | None = None
    select: Any = None
    target: Any = None
    directory: Path | None = None
    on_progress: Callable[[Progress], None] | None = field(default=None, repr=False)

    def progress(self, phase: str, done: int, total: int | None, note: str = "") -> None:
        """Tell whoever listens how far a phase is."""
        if self.on_progress is not None:
            self.on_progress(Progress(phase, done, total, note))

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A random generator that depends on the step's seed and the purpose only."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    def run_generator(self, *purpose: int | str) -> torch.Generator:
        """A random generator that is the same for all steps of a run."""
        seed = self.seed if self.run_seed is None else self.run_seed
        return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on `seed` and the purpose only, the same on every machine (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in "\x1f".join(str(p) for p in (seed, *purpose)).encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 1
