"""The multiple-choice knapsack: one option of each item, enough saved altogether, the least loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gracile.errors import ConfigError

#: Savings are counted in this fraction of the amount: the choice is exact to within one of it for each item.
BINS = 10_000


def choose_options(options: Sequence[Sequence[tuple[float, float]]], amount: float) -> list[int]:
    """argmin Σ_i loss_i subject to Σ_i saved_i ≥ amount, one option (loss, saved) of each item: their indices.

    By dynamic programming over savings rounded down to amount / BINS, so that the amount is always saved; a choice that
    saves less than a bin an item more than asked may be passed over. All that can be saved, where that is less.
    Raises ConfigError for an item without options.
    Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.5.
    """
    if not all(options):
        raise ConfigError("choose_options: an item has no options.")
    greatest = [max(range(len(item)), key=lambda i: (item[i][1], -item[i][0])) for item in options]
    if amount >= sum(item[i][1] for item, i in zip(options, greatest)):
        return greatest
    if amount <= 0:
        return [min(range(len(item)), key=lambda i: item[i][0]) for item in options]
    # least[b]: the least loss of the items so far that saves b bins at least.
    least = torch.full((BINS + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    bins = torch.arange(BINS + 1)
    steps = [[max(0, int(saved / amount * BINS + 1e-9)) for _, saved in item] for item in options]
    chosen = []
    for item, step in zip(options, steps):
        rows = torch.stack([loss + least[(bins - s).clamp(min=0)] for (loss, _), s in zip(item, step)])
        least, best = rows.min(dim=0)
        chosen.append(best)
    if not bool(torch.isfinite(least[BINS])):  # what was rounded away was needed
        return greatest
    indices, left = [], BINS
    for best, step in zip(reversed(chosen), reversed(steps)):
        indices.append(int(best[left]))
        left = max(0, left - step[indices[-1]])
    return indices[::-1]
