"""Allocation: how a total amount to remove is shared out over layers or groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.knapsack import choose_options
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


@dataclass(frozen=True)
class Level:
    """A width that a group may take: units removed, what that does to the outputs, and what it saves.

    in_context: measured with the other groups cut too. Staying whole is then no option but where it was measured.
    """

    removed: int
    loss: float
    saved: float
    in_context: bool = False


@dataclass(frozen=True)
class MeasuredLoss:
    """argmin Σ_g loss_g(r_g)^power subject to Σ_g saved_g(r_g) ≥ amount: a knapsack over widths that were measured.

    loss_g(r): divergence of the model's outputs from the original's with r units of group g alone removed, and the
    layers that read it refitted; saved: the multiply-accumulates (or weights, or units) that go. Losses of single cuts
    add up badly, and a power below 1 makes up for that: a group that is hurt already is hurt on rather than a new one.
    Solved by Lagrangian relaxation, which is exact on the convex hull of the tables.

    levels: widths tried of each group. examples: calibration examples behind one measurement.
    rounds: with a criterion that reads inputs and a repair, the tables are then measured again up to so many times
        around the widths found, all the other groups being cut and refitted, so that losses add up (power 1) for the
        moves they allow: `reach` of a group's units up or down, half of it after a round that got no nearer to the
        original's outputs. 0: the widths of single cuts, by `power`.
    starts: further powers. Where there are rounds, each of them and `power` gives two starts, one of which leaves
        groups whole that several layers read (residual streams); the rounds go on from the one nearest to the original.
    multiple_of: widths tried are multiples of the largest power of two up to this that a group holds four times, and
        half of one. None: any width; of a latency budget, the floats in a vector of this processor.
    Source: the one-shot allocation by loss tables of SPDY (Frantar and Alistarh 2022, arXiv:2201.13096); the rounds
    are ours.
    """

    power: float = 0.5
    starts: tuple[float, ...] = (0.75,)
    levels: int = 8
    examples: int = 512
    rounds: int = 3
    reach: float = 0.25
    multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not all(0 < power <= 2 for power in (self.power, *self.starts)):
            raise ConfigError(
                f"MeasuredLoss(power={self.power!r}, starts={self.starts!r}): expected numbers above 0, at most 2."
            )
        if self.levels < 2 or self.examples < 1:
            raise ConfigError(
                f"MeasuredLoss(levels={self.levels!r}, examples={self.examples!r}): at least 2 levels and 1 example."
            )

        if not isinstance(self.rounds, int) or self.rounds < 0 or not 0 < self.reach <= 1:
            raise ConfigError(
                f"MeasuredLoss(rounds={self.rounds!r}, reach={self.reach!r}): a whole number of at least 0, and a "
                f"share above 0, at most 1."
            )
        if self.multiple_of is not None and (not isinstance(self.multiple_of, int) or self.multiple_of < 1):
            raise ConfigError(f"MeasuredLoss(multiple_of={self.multiple_of!r}): a whole number of at least 1, or None.")

    def counts(self, units: int) -> list[int]:
        """Numbers of units to try removing, at least one being left: equal steps, ascending."""
        return self._snapped((units * i / self.levels for i in range(1, self.levels + 1)), units, least=1)

    def counts_around(self, units: int, removed: int, shrink: float) -> list[int]:
        """Numbers of units to try removing within `reach · shrink` of the present number, which is among them."""
        furthest = max(1, round(self.reach * shrink * units))
        steps = max(1, self.levels // 4)
        around = (removed + round(furthest * i / steps) for i in range(-steps, steps + 1))
        return sorted({*self._snapped(around, units, least=0), removed})

    def _snapped(self, counts: Iterable[float], units: int, least: int) -> list[int]:
        """The counts removed, rounded so that what is left is a multiple, or half of one; `least` is the smallest."""
        step = 1
        while 2 * step <= (self.multiple_of or 1) and 8 * step <= units:
            step *= 2
        left = {min(round((units - count) / step) * step or max(step // 2, 1), units) for count in counts}
        return sorted({units - width for width in left if least <= units - width < units})

    def choose(self, tables: Mapping[str, Sequence[Level]], amount: float) -> dict[str, int]:
        """Units to remove by group, saving at least this amount; the most that the tables hold if they hold less.

        A group may also stay whole, at no loss, unless its table was measured in context. Between two widths of a table
        savings are taken to be linear.
        """
        most = sum(max((level.saved for level in levels), default=0.0) for levels in tables.values())
        wanted = min(amount, most)
        options = _options(tables)

        def at(price: float) -> dict[str, Level]:
            return {
                name: min(options[name], key=lambda level: level.loss**self.power - price * level.saved)
                for name, levels in tables.items()
            }

        low, high = 0.0, 1e-12
        while sum(level.saved for level in at(high).values()) < wanted:
            low, high = high, 4 * high
        for _ in range(60):
            middle = (low + high) / 2
            if sum(level.saved for level in at(middle).values()) < wanted:
                low = middle
            else:
                high = middle
        return _between(at(low), at(high), wanted)

    def choose_levels(self, tables: Mapping[str, Sequence[Level]], amount: float) -> dict[str, int]:
        """As `choose`, but only widths of the tables, for savings that jump: the knapsack in whole numbers."""
        options = _options(tables)
        picked = choose_options(
            [[(level.loss**self.power, level.saved) for level in levels] for levels in options.values()], amount
        )
        return {name: levels[i].removed for (name, levels), i in zip(options.items(), picked)}


def _options(tables: Mapping[str, Sequence[Level]]) -> dict[str, Sequence[Level]]:
    """The tables, with staying whole as a further option where they were not measured in context."""
    return {
        name: levels if any(level.in_context for level in levels) else [Level(0, 0.0, 0.0), *levels]
        for name, levels in tables.items()
    }


def _between(below: Mapping[str, Level], above: Mapping[str, Level], wanted: float) -> dict[str, int]:
    """Counts that just save what is wanted, going from one choice to the next group by group; savings are linear."""
    saved = sum(level.saved for level in below.values())
    removed = {name: level.removed for name, level in below.items()}
    for name, level in above.items():
        step = level.saved - below[name].saved
        if saved < wanted and step > 0:
            share = min(1.0, (wanted - saved) / step)
            removed[name] += math.ceil(share * (level.removed - removed[name]) - 1e-9)
            saved += share * step
    return removed


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ConfigError(f"A fraction of {fraction} cannot be removed; it lies in [0, 1).")
