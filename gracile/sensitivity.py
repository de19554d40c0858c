"""Sensitivity: what few bits in one layer alone do to a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gracile.check import check_request
from gracile.data import Data
from gracile.formats import W2A8, W4A8, W8A8, Format, Scheme
from gracile.goal import Bytes
from gracile.solvers import RoundingSolver
from gracile.steps import Quantize
from gracile.steps.plan import on_a_copy


@dataclass(frozen=True)
class LayerSensitivity:
    """losses: ‖y − y₀‖² / ‖y₀‖² of the outputs for each scheme with only this layer in it, of scores of classes less
    their mean."""

    name: str
    kind: str
    parameters: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The layers in the order in which the model holds them, and the schemes that their losses belong to."""

    schemes: tuple[str, ...]
    layers: tuple[LayerSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_sensitivity(
    model: nn.Module,
    data: Data,
    options: Sequence[Scheme | Format] = (W8A8, W4A8, W2A8),
    *,
    solver: RoundingSolver | None = None,
    exclude: tuple[str, ...] = (),
    seed: int = 0,
) -> Sensitivity:
    """Loss of every layer in every option, all others as they are; what `Quantize(to=Bytes(...))` chooses by.

    options: schemes or formats, two at least. solver: its draft rounds each; None: to nearest. The model is not
    changed. Raises what the step would raise.
    """
    check_request(model, data, None)
    step = Quantize(to=Bytes(1.0), options=tuple(options), solver=solver, exclude=exclude)
    with on_a_copy(step, model, data, None, seed) as (work, context):
        losses = step.measure_losses(work.eval(), context)
    modules = dict(model.named_modules())
    rows = []
    for name, module in modules.items():
        if name in losses:
            count = sum(p.numel() for p in module.parameters(recurse=False))
            rows.append(LayerSensitivity(name, type(module).__name__, count, tuple(losses[name])))
    names = tuple(o.name if isinstance(o, Scheme) else str(o) for o in options)
    return Sensitivity(names, tuple(rows))
