"""The teacher as training asks it: its batch norms folded away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gracile.graph import trace
from gracile.stats.match import BATCH_NORMS
from gracile.steps.quantization.fold import fold_batch_norms


def folded_teacher(teacher: nn.Module, run: Callable[[nn.Module], Any], watched: Collection[str]) -> nn.Module:
    """A copy that computes in eval mode what the teacher does, batch norms folded into the layers before them.

    The norms take a tenth of a forward. run: a forward. watched: modules whose outputs are looked at; layers among them
    keep their norm. The teacher itself where nothing can be folded.
    """
    if not any(isinstance(module, BATCH_NORMS) for module in teacher.modules()):
        return teacher
    pairs = [
        (layer, norm)
        for layer, norm in trace(teacher, run).batch_norm_pairs()
        if layer not in watched and isinstance(teacher.get_submodule(layer), (nn.Linear, _ConvNd))
    ]
    if not pairs:
        return teacher
    folded = copy.deepcopy(teacher)
    fold_batch_norms(folded, pairs, {layer for layer, _ in pairs})
    return folded
