"""What a step would do, found by doing it to a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gracile.context import Context, derive_seed
from gracile.data import Data
from gracile.graph import trace
from gracile.recipe import Step
from gracile.report.model import StepRecord
from gracile.sharing import own_parameters, share_parameters
from gracile.stats.collect import first_batch


def plan_step(step: Step, model: nn.Module, data: Data, target: Any, seed: int) -> StepRecord:
    """The record of `compress(model, step, data, target=target, seed=seed)` for its first step; the model is not
    changed.

    numbers: also parameters and multiply-accumulates of one example before and after. Raises what the step would raise.
    """
    with on_a_copy(step, model, data, target, seed) as (work, context):
        record = step(work, context)
    numbers = dict(record.numbers)
    for label, net in (("before", context.original), ("after", work)):
        numbers[f"parameters_{label}"] = float(sum(p.numel() for p in net.parameters()))
        if data.has_calibration:
            numbers[f"macs_{label}"] = float(trace(net, partial(data.forward, batch=first_batch(data))).macs)
    return replace(record, numbers=numbers)


@contextmanager
def on_a_copy(step: Step, model: nn.Module, data: Data, target: Any, seed: int) -> Iterator[tuple[nn.Module, Context]]:
    """A copy of the model for the step to work on and its context, with the random state of a run's first step."""
    original, work = share_parameters(model).eval(), share_parameters(model)
    if not step.replaces_tensors:
        own_parameters(work, model)
    context = Context(data=data, original=original, teacher=original, target=target, seed=derive_seed(seed, 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "step", 0))
        yield work, context
