"""Scores of weights by a criterion, with the statistics it needs collected first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.errors import DataError
from gracile.layer_stats import ACTIVATION_STATS, GRADIENT_STATS, LayerStats
from gracile.stats.collect import collect_activations, merge_stats
from gracile.stats.gradients import collect_gradients


def score_weights(
    model: nn.Module, weights: Sequence[str], criterion: Any, context: Context, examples: int
) -> Mapping[str, Tensor]:
    """Elementwise scores of the named weights, higher is kept; float32, of each weight's shape.

    They are computed when they are read, each time: together they are as large as the model.
    """
    needs = set(criterion.needs)
    parts: list[dict[str, LayerStats]] = [{name: LayerStats() for name in weights}]
    if needs & GRADIENT_STATS:
        parts.append(
            collect_gradients(
                model,
                weights,
                needs & GRADIENT_STATS,
                context.data,
                examples=examples,
                probes=getattr(criterion, "hutchinson_probes", None) or 1,
                generator=context.generator("hutchinson"),
                on_example=lambda n: context.progress("gradients", n, examples),
            )
        )
    if needs & ACTIVATION_STATS:
        owners = {name: name.rpartition(".")[0] for name in weights}
        measured = collect_activations(model, set(owners.values()), needs & ACTIVATION_STATS, context.data)
        parts.append({name: measured[owner] for name, owner in owners.items() if owner in measured})
    tensors = {name: model.get_parameter(name).detach() for name in weights}
    for name, weight in tensors.items():
        if not torch.isfinite(weight).all():
            raise DataError(f"The weight '{name}' holds NaN or infinity; the model cannot be pruned.")
    return _Scores(tensors, merge_stats(*parts), criterion)


class _Scores(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], stats: Mapping[str, LayerStats], criterion: Any) -> None:
        self.tensors, self.stats, self.criterion = tensors, stats, criterion

    def __getitem__(self, name: str) -> Tensor:
        scores: Tensor = self.criterion(self.tensors[name], self.stats[name])
        return scores

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
