"""Plans: which recipe to try for a share of units removed and a number format, and which options a target has."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gracile.config import to_config
from gracile.criteria import Magnitude, Taylor
from gracile.data import Batch, Data, labels_of, logits_of
from gracile.environment import has_int8_dot_product
from gracile.equalize import SmoothQuant
from gracile.errors import DataError
from gracile.formats import W7A8, W8A8, Scheme, W7A8Dynamic, W8A8Dynamic
from gracile.goal import Bytes, Goal, Latency, MACs, Parameters
from gracile.graph import Trace
from gracile.losses import MeanSquaredError, SoftLabels
from gracile.nn import can_be_dynamic, quantized_kind, recurrent_kind
from gracile.patterns import Channels, Heads
from gracile.ranges import MinMax
from gracile.recipe import Recipe, Step, only
from gracile.report.model import Measurement
from gracile.report.plain import plain
from gracile.solvers import LeastSquares
from gracile.steps.distill import Distill
from gracile.steps.prune import Prune
from gracile.steps.quantize import Quantize

#: Kernels work on vectors of channels: a ragged width costs what the next multiple costs, or more (ResNet-20 in int8 on
#: ONNX Runtime: 16.5 ms at ragged widths of 0.7, 11.3 ms uncut).
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Form:
    """A way to run a model on the target: its precision mode, and the number format of layers (None: float)."""

    target: Any
    scheme: Scheme | None = None

    @property
    def label(self) -> str:
        """For a person: the scheme where there is one, and the runtime's precision mode."""
        precision = str(getattr(self.target, "precision", "float"))
        return precision if self.scheme is None else f"{self.scheme.name} {precision}"


def forms(goal: Goal) -> list[Form]:
    """The forms the target may run faster: as asked for first, its other precision modes, and integers in each mode."""
    target = goal.target
    modes = [target]
    for precision in target.capabilities.precisions:
        if precision != getattr(target, "precision", precision):
            modes.append(replace(target, precision=precision))
    scheme = integer_scheme(target)
    return [Form(mode) for mode in modes] + ([Form(mode, scheme) for mode in modes] if scheme is not None else [])


def integer_scheme(target: Any) -> Scheme | None:
    """The scheme of 8-bit integer kernels that this processor adds up exactly; None where the target has no kernels."""
    known = target.capabilities.schemes
    if W7A8.name in known and not has_int8_dot_product():
        return W7A8
    return W8A8 if W8A8.name in known else None


def prune_steps(fraction: float, traced: Trace, data: Data) -> list[Step]:
    """Steps that remove a share of the channels, and of the heads where the model has any."""
    criterion = Taylor() if data.train is not None and data.loss is not None else Magnitude()
    kinds = {group.kind for group in traced.groups if group.frozen is None}
    patterns = [p for p in (Channels(multiple_of=WIDTH_MULTIPLE), Heads()) if set(p.kinds) & kinds]
    repair = LeastSquares() if data.has_calibration else None
    return [Prune(fraction, criterion=criterion, pattern=pattern, repair=repair) for pattern in patterns]


def recipe_for(
    fraction: float, form: Form, traced: Trace, model: nn.Module, data: Data, goal: Goal, mixed_precision: bool
) -> Recipe | None:
    """Prune, distil where there are training data, quantize where the form is of integers; None for nothing to do."""
    steps: list[Step] = prune_steps(fraction, traced, data) if fraction > 0 else []
    if steps and data.train is not None and goal.epochs:
        steps.append(Distill(losses=losses_for(model, data), epochs=goal.epochs, mixed_precision=mixed_precision))
    if form.scheme is not None:
        steps += quantize_steps(form, traced, model)
    return Recipe(*steps) if steps else None


def quantize_steps(form: Form, traced: Trace, model: nn.Module, *, for_timing: bool = False) -> list[Step]:
    """Integers for all layers: where the target has LSTMs of integers, those round inputs and states as they come.

    for_timing: as fast to make as can be, uncorrected.
    """
    assert form.scheme is not None
    kinds = {name: m for name, m in model.named_modules() if recurrent_kind(m) or quantized_kind(m)}
    integer = form.target.capabilities.integer_lstms
    lstms = [name for name, module in kinds.items() if name and integer and can_be_dynamic(module)]
    steps: list[Step] = []
    if lstms:
        dynamic = W7A8Dynamic if form.scheme == W7A8 else W8A8Dynamic
        steps.append(only(lstms, Quantize(dynamic, correct=False)))
    if len(kinds) > len(lstms):
        step = replace(quantize_step(form.scheme, traced), exclude=tuple(lstms))
        steps.append(replace(step, ranges=MinMax(), correct=False) if for_timing else step)
    return steps


def quantize_step(scheme: Scheme, traced: Trace) -> Quantize:
    """Layer norms leave few channels, and few tokens, with far larger values, and clipping those costs most.

    MiniLM in W8A8, squared error of its unit vectors on held-out sentences: 0.0123 by MSE ranges, 0.0132 by min-max,
    0.0093 by MSE and 0.0043 by min-max once smoothed. Convolutions do better with MSE ranges by a fifth of the KL.
    """
    normalised = any(layer.kind.endswith(("LayerNorm", "RMSNorm")) for layer in traced.layers)
    if scheme.input is not None and normalised:
        return Quantize(scheme, ranges=MinMax(), equalize=SmoothQuant())
    return Quantize(scheme)


def losses_for(model: nn.Module, data: Data) -> tuple[Any, ...]:
    """Soft labels for a classifier, the squared error of the outputs for anything else."""
    assert data.train is not None
    batch: Batch = next(iter(data.train))
    with torch.no_grad():
        outputs = logits_of(data.forward(model, batch))
    try:
        labels = labels_of(batch)
    except DataError:
        labels = None
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or (labels is not None and labels.is_floating_point()):
        return (MeanSquaredError(),)
    return (SoftLabels(temperature=3.0),)


def mixed_precision_pays(model: nn.Module, data: Data, steps: int = 3) -> bool:
    """Whether a training step in bfloat16 takes less than three quarters of one in float32 here, by timing both."""
    assert data.train is not None
    batch = next(iter(data.train))
    net = _trainable_copy(model)
    seconds = {}
    for enabled in (False, True, False, True):
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(next(net.parameters()).device.type, dtype=torch.bfloat16, enabled=enabled):
                loss = logits_of(data.forward(net, batch)).float().square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
        seconds[enabled] = time.perf_counter() - start  # the first round of each warms up
    return seconds[True] < 0.75 * seconds[False]


def _trainable_copy(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model).eval()
    for p in clone.parameters():
        p.requires_grad_(p.is_floating_point())
    return clone


def broken_limits(goal: Goal, before: Measurement, after: Measurement) -> list[str]:
    """What each limit of the goal that does not hold is, and what was measured."""
    amounts = {
        Latency: (before.latency_p50_ms, after.latency_p50_ms, "ms"),
        MACs: (before.macs, after.macs, "MACs"),
        Parameters: (before.parameters, after.parameters, "parameters"),
        Bytes: (before.file_bytes, after.file_bytes, "bytes"),
    }
    broken = []
    for budget in goal.limits:
        original, measured, unit = amounts[type(budget)]
        if original is None or measured is None:
            continue
        limit = budget.limit(float(original))
        if measured > limit:
            broken.append(f"{measured:.4g} {unit}, limit {limit:.4g}")
    return broken


def goal_data(goal: Goal, before: Measurement) -> dict[str, Any]:
    """The goal as the report shows it, with limits in the units that were measured."""
    described = plain(to_config(goal))
    wanted = [
        b.limit(float(before.latency_p50_ms)) for b in goal.limits if isinstance(b, Latency) and before.latency_p50_ms
    ]
    described["latency_ms"] = min(wanted) if wanted else None
    return dict(described)
