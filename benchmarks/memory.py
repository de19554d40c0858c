"""How much memory a process has held, and how much the activations of a module take."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gracile.stats.sums import read_call


def peak_bytes() -> int:
    """The most that it has held since `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> int:
    """Let the peak start from here; what this process holds now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


@torch.no_grad()
def activation_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """What a module's first call in a forward computes, views not counted; run: feeds the model one batch."""
    args, kwargs, _ = read_call(module, run)
    with _New() as made:
        module(*args, **kwargs)
    return made.nbytes


class _New(TorchDispatchMode):
    """Adds up the memory that operators fill anew."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.nbytes += leaf.untyped_storage().nbytes()
        return output


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
