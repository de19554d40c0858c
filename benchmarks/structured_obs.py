"""Structured OBS against exhaustive search: excess over the least error that any set of units of that size leaves.

    python -m benchmarks.structured_obs [--seeds 20] [--units 12]

Random layers with correlated inputs: linear ones (a column for each unit), convolutions (nine), and two layers of both
kinds that read the same units. Prints one line for each kind and share removed, and one over all.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch
from torch import Tensor

from gracile.criteria import OBS, Consumer, Units

KINDS = {"linear": (1,), "convolution": (9,), "linear and convolution": (1, 9)}
SHARES = (0.25, 0.5, 0.75)


def readers_of(seed: int, units: int, taps: tuple[int, ...], out: int = 16) -> tuple[Consumer, ...]:
    """Layers that read the units. Inputs are mixtures of half as many sources as columns, and noise."""
    found = []
    for index, k in enumerate(taps):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        d = units * k
        sources = torch.randn(8 * d, d // 2, generator=generator, dtype=torch.float64)
        mixed = sources @ torch.randn(d // 2, d, generator=generator, dtype=torch.float64) / (d // 2) ** 0.5
        inputs = mixed + torch.randn(8 * d, d, generator=generator, dtype=torch.float64)
        weight = torch.randn(out, d, generator=generator, dtype=torch.float64)
        columns = torch.arange(d).reshape(units, k)
        found.append(Consumer(str(k), weight, 2 * inputs.T @ inputs / len(inputs), inputs.mean(0), columns))
    return tuple(found)


def joint_cost(readers: tuple[Consumer, ...], kept: list[int]) -> float:
    """Σ tr(W H Wᵀ) − tr(W H_:K (H_KK)⁻¹ H_K: Wᵀ), each over tr(W H Wᵀ): least squares on the kept columns."""
    total = 0.0
    for c in readers:
        k = c.columns[kept].flatten()
        target: Tensor = c.weight @ c.gram
        whole = float((target * c.weight).sum())
        total += 1 - float((torch.linalg.solve(c.gram[k][:, k], target[:, k].T).T * target[:, k]).sum()) / whole
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--units", type=int, default=12)
    args = parser.parse_args()
    criterion = OBS(damping=1e-12)
    everything: dict[str, list[float]] = {"greedy": [], "swap": []}
    for (kind, taps), share in itertools.product(KINDS.items(), SHARES):
        excess: dict[str, list[float]] = {"greedy": [], "swap": []}
        for seed in range(args.seeds):
            readers = readers_of(seed, args.units, taps)
            units = Units(consumers=readers)
            count = args.units - round(share * args.units)
            best = min(joint_cost(readers, list(kept)) for kept in itertools.combinations(range(args.units), count))
            order = criterion.unit_scores(units).argsort(descending=True)
            greedy = sorted(order[:count].tolist())
            for name, kept in (("greedy", greedy), ("swap", criterion.choose(units, greedy))):
                excess[name].append(joint_cost(readers, kept) / best - 1)
                everything[name].append(excess[name][-1])
        print(json.dumps({"kind": kind, "removed": share, **_percent(excess)}), flush=True)
    print(json.dumps({"layers": len(everything["swap"]), **_percent(everything)}))


def _percent(excess: dict[str, list[float]]) -> dict[str, float]:
    """Mean and largest excess in percent, by name."""
    found = {}
    for name, values in excess.items():
        found[f"{name}_mean_percent"] = round(100 * sum(values) / len(values), 4)
        found[f"{name}_largest_percent"] = round(100 * max(values), 3)
    return found


if __name__ == "__main__":
    main()
