"""Batch norms made ready for training: statistics of the training batches stored, the function the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch
from gracile.modes import eval_mode
from gracile.stats.match import BATCH_NORMS
from gracile.stats.match_layer import ChannelMoments

#: Batches behind the new statistics.
BATCHES = 16


def recentre_batch_norms(model: nn.Module, run: Callable[[Batch], Any], batches: Iterable[Batch]) -> int:
    """Restate γ (x − μ) / σ + β by the statistics μ', σ' of what arrives: γ' = γ σ' / σ, β' = β + γ (μ' − μ) / σ.

    In eval mode the model computes what it did, but for rounding. In training a batch norm uses the batch's statistics
    in place of the stored ones; where these are others, as in nets trained on other batches or cut since, the first
    step starts from another function than the model's. Afterwards it starts from the model's.

    run: a forward of the model. Returns how many norms were restated: those with stored statistics, γ and β, that run.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None and m.affine]
    if not norms:
        return 0
    arriving: dict[nn.Module, ChannelMoments] = {}

    def add(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        arriving.setdefault(norm, ChannelMoments()).add(args[0].movedim(1, -1).flatten(0, -2))

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        with eval_mode(model), torch.no_grad():
            for batch in itertools.islice(batches, BATCHES):
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for norm, moments in arriving.items():
            _restate(norm, moments.mean, moments.variance)
    return len(arriving)


def _restate(norm: Any, mean: Tensor, variance: Tensor) -> None:
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    norm.bias.copy_(norm.bias.double() + gain * (mean - norm.running_mean.double()))
    norm.weight.copy_(gain * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
