"""Layers refitted one after another to what they computed in the original, on the inputs they now receive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gracile.solvers import LeastSquares, Moments
from gracile.stats.moments import CannotRefitError, LayerMoments
from gracile.stats.norms import has_factors
from gracile.stats.rows import unfoldable


def refittable(module: nn.Module) -> bool:
    """Whether inputs unfold into rows for one weight matrix: linear layers, ungrouped 1-d and 2-d convolutions."""
    return unfoldable(module) and getattr(module, "groups", 1) == 1


@dataclass
class Refit(LayerMoments):
    """Refits layers of a compressed model in place, each to the original's outputs on the inputs that it now gets.

    Of normalisations with a factor for each channel (`has_factors`) these and the bias are refitted, in the same way.
    """

    solver: LeastSquares = field(default_factory=LeastSquares)

    @torch.no_grad()
    def solve(self, name: str, moments: Moments, columns: Tensor | None = None) -> None:
        """Set the layer to its least-squares weight; with columns, of those inputs only, and zero on the others."""
        layer: Any = self.model.get_submodule(name)
        if has_factors(layer):
            self._solve_factors(name, moments)
            return
        source: Any = self.targets.original.get_submodule(name)
        rows = self.kept.get(name, torch.arange(len(source.weight))).to(source.weight.device)
        prior = layer.weight.flatten(1).cpu()
        if columns is not None:
            moments, prior = moments.keep(columns), source.weight[rows].flatten(1).cpu()[:, columns]
        solved, shift = self.solver(prior, moments, self.centred(name))
        if columns is not None:
            whole = torch.zeros(len(solved), layer.weight[0].numel(), dtype=solved.dtype)
            solved = whole.index_copy(1, columns, solved)
        zeros = (layer.weight == 0) if columns is None else torch.zeros_like(layer.weight, dtype=torch.bool)
        layer.weight.copy_(solved.reshape(layer.weight.shape)).masked_fill_(zeros, 0.0)
        if bool(zeros.any()):  # the intercept was solved for weights that do not stay
            return
        self.shift(name, shift)

    def _solve_factors(self, name: str, moments: Moments) -> None:
        """Set each factor of a normalisation to the least-squares one of its channel, and the bias if it has one."""
        layer: Any = self.model.get_submodule(name)
        prior, centre = layer.weight.double().cpu(), self.centred(name)
        solved = [self.solver(prior[i].view(1, 1), moments.of_group(i), centre) for i in range(len(prior))]
        layer.weight.copy_(torch.cat([v.flatten() for v, _ in solved]))
        if centre:
            self.shift(name, torch.cat([shift for _, shift in solved]))


def refit(repair: Refit, layers: Sequence[str], *, on_layer: Callable[[int], None] | None = None) -> dict[str, str]:
    """Refit the named layers in the order given, each on inputs that earlier refits produce; why some were not.

    layers: refittable layers and normalisations with factors, in the order in which the model calls them, each once.
    """
    skipped = {}
    for done, name in enumerate(layers):
        try:
            repair.solve(name, repair.measure(name))
        except CannotRefitError as error:
            skipped[name] = str(error)
        if on_layer is not None:
            on_layer(done + 1)
    repair.replay.clear()
    return skipped
