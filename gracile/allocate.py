"""Allocation: how a total amount to remove is shared out over layers or groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.patterns import lowest


@dataclass(frozen=True)
class Uniform:
    """The same fraction of every layer, rounded so that the total is exact."""

    def __call__(
        self, scores: Mapping[str, Tensor], fraction: float, costs: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """Number to remove by name: fraction · n_i, largest remainders rounded up; their sum is round(fraction · n).

        scores: only their sizes count. costs: not used. At least one unit of each stays, and where that leaves less to
        remove than asked, the sum is less.
        """
        _check_fraction(fraction)
        sizes = {name: value.numel() for name, value in scores.items()}
        caps = {name: max(size - 1, 0) for name, size in sizes.items()}
        total = min(round(fraction * sum(sizes.values())), sum(caps.values()))
        removed = {name: math.floor(fraction * size) for name, size in sizes.items()}
        by_remainder = sorted(sizes, key=lambda name: removed[name] - fraction * sizes[name])
        while sum(removed.values()) < total:
            for name in by_remainder:
                if sum(removed.values()) < total and removed[name] < caps[name]:
                    removed[name] += 1
        return removed


@dataclass(frozen=True)
class GlobalRank:
    """One ranking over all layers: the lowest scores go, wherever they are.

    max_fraction: no layer or group loses more than this share of its own.
    per_cost: rank by score divided by what one unit costs, the greedy rule of the knapsack problem, where costs are
        known. Meant for raw scores (`Channels(normalise=False)`): normalised ones no longer grow with a unit's size.
    """

    max_fraction: float = 1.0
    per_cost: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_fraction <= 1:
            raise ConfigError(f"GlobalRank(max_fraction={self.max_fraction}): a share above 0, at most 1.")

    def __call__(
        self, scores: Mapping[str, Tensor], fraction: float, costs: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """Number to remove by name; their sum is round(fraction · n), of equal scores the earlier name and index first.

        costs: of one unit, by name; read if `per_cost`. At least one unit of each stays, and where that leaves less to
        remove than asked, the sum is less. Raises ConfigError for a fraction above `max_fraction`.
        """
        _check_fraction(fraction)
        if fraction > self.max_fraction:
            raise ConfigError(
                f"GlobalRank(max_fraction={self.max_fraction:g}): cannot remove {fraction:g} of all while each keeps "
                f"{1 - self.max_fraction:g}.\n  Ask for less, or raise max_fraction."
            )
        if self.per_cost:
            if costs is None:
                raise ConfigError("GlobalRank(per_cost=True): no costs are known here.\n  Use GlobalRank().")
            scores = {name: value / costs[name] for name, value in scores.items()}
        candidates, owners = [], []
        for index, value in enumerate(scores.values()):
            flat = value.reshape(-1)
            cap = min(math.floor(self.max_fraction * flat.numel() + 1e-9), flat.numel() - 1)  # 0.29 · 100 is 28.99…
            removable = flat[lowest(flat, cap)]
            candidates.append(removable)
            owners.append(torch.full_like(removable, index, dtype=torch.int32))
        if not candidates:
            return {}
        ranked = torch.cat(candidates)
        count = min(round(fraction * sum(value.numel() for value in scores.values())), ranked.numel())
        removed = torch.bincount(torch.cat(owners)[lowest(ranked, count)], minlength=len(candidates))
        return dict(zip(scores, removed.tolist()))


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ConfigError(f"A fraction of {fraction} cannot be removed; it lies in [0, 1).")
