"""The layers that read the units of a group, with the moments of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.criteria import Consumer
from gracile.graph import Group, Trace
from gracile.graph.groups import Member
from gracile.sharing import tied_groups
from gracile.stats.collect import collect_activations
from gracile.stats.refit import refittable
from gracile.stats.targets import ROWS


def readers(model: nn.Module, group: Group) -> dict[str, Member]:
    """Layer -> the member by which it reads the group: linear and ungrouped convolution layers, each once.

    Empty where anything else reads it too (a recurrent or a transposed layer), for then these would not say it all.
    """
    found = {}
    for member in group.members:
        if member.role != "consumer":
            continue
        layer, _, tensor = member.tensor.rpartition(".")
        if tensor != "weight" or member.axis != 1 or not layer or not refittable(model.get_submodule(layer)):
            return {}
        found[layer] = member
    return found


def tied_layers(model: nn.Module) -> set[str]:
    """Layers whose weight another module holds too: what is done to it for the one is done to the other."""
    return {layer for group in tied_groups(model) for layer in group}


def collect_consumers(
    model: nn.Module, traced: Trace, groups: Sequence[Group], context: Context
) -> dict[str, list[Consumer]]:
    """What reads each group, by its name: weights and second moments of inputs from one pass over the calibration data.

    Moments are about the mean where a bias or a batch norm takes up what a shift of the inputs would change.
    """
    found = {group.name: readers(model, group) for group in groups}
    layers = sorted({layer for named in found.values() for layer in named})
    batches = sum(1 for _ in context.data.calibration_batches)
    stats = collect_activations(
        model,
        layers,
        {"gram", "input_mean"},
        context.data,
        rows_per_batch=max(1, ROWS // max(1, batches)),
        on_batch=lambda n: context.progress("moments", n, None),
    )
    normalised = {name for name, _ in traced.batch_norm_pairs()}
    consumers: dict[str, list[Consumer]] = {}
    for group in groups:
        consumers[group.name] = []
        for layer, member in found[group.name].items():
            if layer not in stats:
                continue
            module = model.get_submodule(layer)
            weight: Tensor = module.weight.detach()  # type: ignore[operator,union-attr,assignment]
            gram, mean = stats[layer].gram, stats[layer].input_mean
            assert gram is not None and mean is not None
            gram = gram[0].double()
            if layer in normalised or getattr(module, "bias", None) is not None:
                gram = gram - 2 * torch.outer(mean, mean)
            columns = input_columns(member.positions, weight)
            consumers[group.name].append(Consumer(layer, weight.flatten(1), gram, mean, columns))
    return consumers


def input_columns(positions: Tensor, weight: Tensor) -> Tensor:
    """[units, k · kernel]: the columns of the unfolded weight that belong to the units' positions along axis 1."""
    kernel = weight[0, 0].numel()
    taps = torch.arange(kernel)
    return (positions.cpu().unsqueeze(-1) * kernel + taps).flatten(1)
