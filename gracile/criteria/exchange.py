"""Swap search: a set of removed units made cheaper by exchanging one of them for one that is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: An exchange has to lower the joint cost by this share of it; rounding must not make the search go round in circles.
LEAST_GAIN = 1e-9


class Reader:
    """One layer while the set of kept columns changes: V, its best weight on them, and B = (H_KK)⁻¹.

    hessian: [d, d] H, positive definite. weight: [out, d]. columns: [units, k], the columns that read each unit.
    energy: what its cost is divided by. All float64. V and B have the full size, with zeros where columns are removed.
    """

    def __init__(self, hessian: Tensor, weight: Tensor, columns: Tensor, energy: float) -> None:
        self.hessian, self.columns, self.energy = hessian, columns, energy
        self.target = weight @ hessian  # what V H has to be on the kept columns
        self.whole = float((self.target * weight).sum())

    def restrict(self, gone: Sequence[int]) -> None:
        """Start anew with these units removed."""
        kept = torch.ones(len(self.hessian), dtype=torch.bool)
        kept[self.columns[list(gone)].flatten()] = False
        k = kept.nonzero().squeeze(1)
        inverse = torch.linalg.inv(self.hessian[k][:, k])
        self.inverse = torch.zeros_like(self.hessian)
        self.inverse[k[:, None], k] = (inverse + inverse.T) / 2
        self.solved = self.target @ self.inverse

    def cost(self) -> float:
        """½ (tr(W H Wᵀ) − tr(V H Wᵀ)), the least error with the present columns, over the energy."""
        return 0.5 * (self.whole - float((self.solved * self.target).sum())) / self.energy

    def border(self, unit: int) -> None:
        """Prepare for a removed unit s to come back: B u with u = H_:s, s = H_ss − uᵀ B u, and e = (W H)_s − V u."""
        s = self.columns[unit]
        u = self.hessian[:, s]
        self.spread = self.inverse @ u  # [d, k], zero where columns are removed
        schur = self.hessian[s][:, s] - u.T @ self.spread
        missing = self.target[:, s] - self.solved @ u  # [out, k]
        self.step = torch.linalg.solve(schur, missing.T).T  # e s⁻¹
        self.gain = 0.5 * float((self.step * missing).sum()) / self.energy
        self.schur_inverse = torch.linalg.inv(schur)

    def costs(self, alive: Tensor) -> Tensor:
        """What removing each of these kept units would cost once the prepared unit is back: [len(alive)]."""
        columns = self.columns[alive]
        spread = self.spread[columns]  # [units, k, k of the prepared unit]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        blocks = blocks + spread @ self.schur_inverse @ spread.transpose(1, 2)
        w = self.solved[:, columns].permute(1, 2, 0) - spread @ self.step.T  # [units, k, out]
        return 0.5 * (w * torch.linalg.solve(blocks, w)).sum((1, 2)) / self.energy

    def swap(self, back: int, gone: int) -> None:
        """Let the prepared unit `back` return, and remove `gone`."""
        s, t = self.columns[back], self.columns[gone]
        wide = self.spread.clone()
        wide[s] = -torch.eye(len(s), dtype=wide.dtype)
        self.inverse += wide @ self.schur_inverse @ wide.T
        self.solved -= self.step @ wide.T
        step = torch.linalg.solve(self.inverse[t][:, t], self.inverse[t])
        self.solved -= self.solved[:, t] @ step
        self.inverse -= self.inverse[:, t] @ step
        self.inverse[t], self.inverse[:, t], self.solved[:, t] = 0, 0, 0


def exchange(readers: Sequence[Reader], kept: Sequence[int], sweeps: int) -> tuple[float, list[int]]:
    """(joint cost over all readers, units kept in ascending order) after at most `sweeps` passes; it never rises.

    In each pass every removed unit is tried against all kept ones, and exchanged for the best of them if that lowers
    the joint cost. Ends early where a pass finds nothing.
    """
    count = len(readers[0].columns)
    alive = list(kept)
    for _ in range(sweeps):
        removed = sorted(set(range(count)) - set(alive))
        for reader in readers:
            reader.restrict(removed)
        exchanged = False
        for unit in removed:
            for reader in readers:
                reader.border(unit)
            candidates = torch.tensor(sorted(alive))
            changes = torch.stack([reader.costs(candidates) - reader.gain for reader in readers]).sum(0)
            best = int(changes.argmin())
            other = int(candidates[best])
            if float(changes[best]) >= -LEAST_GAIN * sum(reader.gain for reader in readers):
                continue
            for reader in readers:
                reader.swap(unit, other)
            alive = [u for u in alive if u != other] + [unit]
            exchanged = True
        if not exchanged:
            break
    removed = sorted(set(range(count)) - set(alive))
    for reader in readers:
        reader.restrict(removed)
    return sum(reader.cost() for reader in readers), sorted(alive)
