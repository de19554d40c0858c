"""Inspection: what a model is made of and what can be cut from it, before anything is touched."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gracile.check import check_request
from gracile.data import Data
from gracile.errors import ModelError
from gracile.evaluate.size import count_parameters, state_bytes
from gracile.graph import Group, trace


@dataclass(frozen=True)
class LayerView:
    """A layer. Shapes with the batch, MACs per example and calls per forward; None where it was not run."""

    name: str
    kind: str
    parameters: int
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    macs: int | None = None
    calls: int | None = None


@dataclass(frozen=True)
class GroupView:
    """Tied axes: units that can only be cut from all members at once.

    kind: channels, heads, head_dim or hidden. producers, consumers: "tensor[axis]" that make and that read the units.
    frozen: why none can be cut, None where they can. exact: why cutting differs from zeroing, None where it does not.
    tied_count: groups of the same key keep the same number of units.
    """

    name: str
    kind: str
    units: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str | None
    exact: str | None
    tied_count: str | None


@dataclass(frozen=True)
class Inspection:
    """A model's layers in the order they run (as declared, without data), totals, and groups of tied axes."""

    model: str
    parameters: int
    zeros: int
    state_bytes: int
    layers: tuple[LayerView, ...]
    macs: int | None = None
    groups: tuple[GroupView, ...] = ()
    unknown_operators: tuple[str, ...] = ()

    @property
    def frozen_by_reason(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(reason, names of the groups frozen for it), the most frequent reason first."""
        found: dict[str, list[str]] = {}
        for group in self.groups:
            if group.frozen is not None:
                found.setdefault(group.frozen, []).append(group.name)
        return tuple((reason, tuple(names)) for reason, names in sorted(found.items(), key=lambda i: -len(i[1])))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect_model(model: nn.Module, data: Data | None = None) -> Inspection:
    """What a model is made of: layers, shapes, parameters and MACs, and which axes are tied or frozen.

    data: gives the batch to run it on. None: layers and parameters only, since the rest shows when a model runs.
    Raises ModelError or DataError where the two do not work together.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected a PyTorch model (nn.Module), got a {type(model).__name__}.")
    count = count_parameters(model)
    name, size = type(model).__name__, state_bytes(model)
    if data is None:
        return Inspection(name, count.total, count.zeros, size, _declared(model))
    check_request(model, data)
    calibration = data.has_calibration or data.evaluation is None  # without either, this raises
    batch = next(iter(data.calibration_batches if calibration else data.evaluation or ()))
    traced = trace(model, lambda net: data.forward(net, batch))
    declared = {layer.name: layer for layer in _declared(model)}
    layers = [
        LayerView(
            name=i.name,
            kind=i.kind,
            parameters=declared[i.name].parameters if i.name in declared else i.parameters,
            input_shape=i.input_shape,
            output_shape=i.output_shape,
            macs=i.macs,
            calls=i.calls,
        )
        for i in traced.layers
    ]
    ran = {layer.name for layer in layers}
    layers += [layer for layer in declared.values() if layer.name not in ran]
    groups = tuple(_view(group) for group in traced.groups)
    return Inspection(
        name, count.total, count.zeros, size, tuple(layers), traced.macs, groups, tuple(traced.unknown_operators)
    )


def _declared(model: nn.Module) -> tuple[LayerView, ...]:
    """Modules with weights of their own; encoded weights count as what they decode to."""
    views = []
    for name, module in model.named_modules():
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        encoded = getattr(module, "weight_shape", None)
        if isinstance(encoded, tuple) and "weight" not in module._parameters:
            parameters += math.prod(encoded)
        if parameters:
            views.append(LayerView(name, type(module).__name__, parameters))
    return tuple(views)


def _view(group: Group) -> GroupView:
    return GroupView(
        name=group.name,
        kind=group.kind,
        units=group.units,
        producers=_axes(group, "producer"),
        consumers=_axes(group, "consumer"),
        frozen=group.frozen,
        exact=group.exact,
        tied_count=group.tied_count,
    )


def _axes(group: Group, role: str) -> tuple[str, ...]:
    return tuple(f"{m.tensor}[{m.axis}]" for m in group.members if m.role == role)
