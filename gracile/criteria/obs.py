"""OBS: what removing a weight or a unit costs its layer's output once the remaining weights have made up for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.criteria.base import CannotScoreError, Consumer, Units
from gracile.criteria.exchange import Reader, exchange
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class OBS:
    """ρ_S = ½ Σ_rows w_S ([H⁻¹]_SS)⁻¹ w_Sᵀ, the least increase of ½ tr(ΔW H ΔWᵀ) with the columns S at zero.

    H = (2/N) Σ x xᵀ of the layer's inputs. For a single weight this is ½ w² / [H⁻¹]_jj (Hassibi and Stork 1992, eq. 5),
    with the layer's output error for the loss, as in Optimal Brain Compression (Frantar and Alistarh 2022,
    arXiv:2208.11580). For a unit, S are the columns that read it, and units go one by one, each removal followed by the
    optimal update of weights and of H⁻¹, as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089). Here a unit's cost is the
    sum over all layers that read it, each as a fraction of that layer's output energy, and once it is known how many
    units stay, `choose` improves the set by swap search.

    damping: added to the diagonal of H, as a fraction of its mean.
    rounds: units go in at most about so many rounds, the cheapest together where there are more; the weights are
        updated between rounds. Widths of more units than this are not searched by swaps either, for the time it takes.
    swap_sweeps: passes of the swap search over the removed units, each exchanged for a kept one where that lowers their
        joint cost; ends early where none does. 0: the units that went first stay removed.
    """

    damping: float = 0.01
    swap_sweeps: int = 4
    rounds: int = 128
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"OBS(damping={self.damping!r}): expected a positive number.")
        if not isinstance(self.swap_sweeps, int) or self.swap_sweeps < 0:
            raise ConfigError(f"OBS(swap_sweeps={self.swap_sweeps!r}): expected a whole number of at least 0.")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ConfigError(f"OBS(rounds={self.rounds!r}): expected a whole number of at least 1.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """½ w² / [H⁻¹]_jj of every single weight, float32; the layer is linear or a convolution, grouped or not."""
        if stats.gram is None:
            raise ConfigError("OBS: the statistic 'gram' was not collected.\n  It needs Data(calibration=...).")
        if len(weight) % len(stats.gram) or weight[0].numel() != stats.gram.shape[-1]:
            raise ConfigError(
                f"OBS: the statistic 'gram' has shape {tuple(stats.gram.shape)}, "
                f"and the weight {tuple(weight.shape)}.\n"
                f"  It was collected for another layer, or before the layer was cut: collect it again."
            )
        diagonals = torch.stack([self._inverse(h).diagonal() for h in stats.gram])  # [groups, d]
        rows = weight.detach().double().reshape(len(diagonals), -1, diagonals.shape[1]).cpu()
        scores = 0.5 * rows.square() / diagonals.unsqueeze(1)
        return scores.reshape(weight.shape).float().to(weight.device)

    def unit_scores(self, units: Units) -> Tensor:
        """[units] float64: what each unit cost when its turn came, raised above the one before where it cost less.

        Of units that go in one round, each costs what it would have cost alone.
        """
        if not units.consumers:
            raise CannotScoreError("OBS: not all that reads it are linear or ungrouped convolution layers")
        states = [_Eliminated(c, c.weight.detach().double().cpu(), self._inverse(c.gram)) for c in units.consumers]
        count = len(units.consumers[0].columns)
        scores = torch.empty(count, dtype=torch.float64)
        alive = torch.arange(count)
        last = 0.0
        together = math.ceil(count / self.rounds)
        while len(alive):
            losses = torch.stack([state.losses(alive) for state in states]).sum(0)
            order = losses.argsort(stable=True)[:together]
            for loss, unit in zip(losses[order].tolist(), alive[order].tolist(), strict=True):
                last = max(loss, math.nextafter(last, math.inf))
                scores[unit] = last
            for state in states:
                state.eliminate(state.columns[alive[order]].flatten())
            left = torch.ones(len(alive), dtype=torch.bool)
            left[order] = False
            alive = alive[left]
        return scores

    def choose(self, units: Units, kept: Sequence[int]) -> list[int]:
        """As many units to keep, ascending, whose complement costs no more to remove jointly.

        Swap search from the units given and from those that greedy selection takes up one by one; the cheaper outcome.
        """
        if not self.swap_sweeps or len(units.consumers[0].columns) > self.rounds:
            return sorted(kept)
        readers = [
            Reader(self._damped(c.gram), c.weight.detach().double().cpu(), c.columns.cpu(), output_energy(c))
            for c in units.consumers
        ]
        starts = [sorted(kept), self._selected(units, len(kept))]
        return min((exchange(readers, start, self.swap_sweeps) for start in starts), key=lambda found: found[0])[1]

    def _selected(self, units: Units, count: int) -> list[int]:
        """The units kept by greedy selection: from none on, each time the one that lowers the cost most.

        Taking columns up is the same elimination as removing them, on (W H, H) instead of (W, H⁻¹).
        """
        states = []
        for c in units.consumers:
            h = self._damped(c.gram)
            states.append(_Eliminated(c, c.weight.detach().double().cpu() @ h, h))
            others = torch.ones(len(h), dtype=torch.bool)
            others[c.columns.flatten()] = False
            states[-1].eliminate(others.nonzero().squeeze(1))  # columns of no unit always stay
        alive = torch.arange(len(units.consumers[0].columns))
        kept: list[int] = []
        for _ in range(count):
            unit = int(alive[torch.stack([state.losses(alive) for state in states]).sum(0).argmax()])
            kept.append(unit)
            for state in states:
                state.eliminate(state.columns[unit])
            alive = alive[alive != unit]
        return sorted(kept)

    def _damped(self, gram: Tensor) -> Tensor:
        h = gram.double().cpu()
        mean = float(h.diagonal().mean())
        ridge = self.damping * mean if mean > 0 else 1.0  # inputs that are always zero make every removal free
        return h + ridge * torch.eye(len(h), dtype=h.dtype)

    def _inverse(self, gram: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(self._damped(gram))
        return (inverse + inverse.T) / 2


def output_energy(consumer: Consumer) -> float:
    """½ tr(W H Wᵀ), the layer's output energy; 1 where it has none."""
    weight = consumer.weight.detach().double().cpu()
    energy = 0.5 * float(((weight @ consumer.gram.double().cpu()) * weight).sum())
    return energy if energy > 0 else 1.0


class _Eliminated:
    """One consumer while columns are eliminated: with (W, H⁻¹) they are removed, with (W H, H) they are taken up."""

    def __init__(self, consumer: Consumer, rows: Tensor, matrix: Tensor) -> None:
        self.rows, self.matrix = rows.clone(), matrix.clone()
        self.columns, self.energy = consumer.columns.cpu(), output_energy(consumer)

    def losses(self, alive: Tensor) -> Tensor:
        """½ Σ_rows w_S ([M]_SS)⁻¹ w_Sᵀ of each unit that is left, over the layer's output energy."""
        columns = self.columns[alive]
        blocks = self.matrix[columns[:, :, None], columns[:, None, :]]  # [units, k, k]
        w = self.rows[:, columns].permute(1, 2, 0)  # [units, k, out]
        return 0.5 * (w * torch.linalg.solve(blocks, w)).sum((1, 2)) / self.energy

    def eliminate(self, s: Tensor) -> None:
        """W −= W_S ([M]_SS)⁻¹ [M]_S: and the same for M."""
        step = torch.linalg.solve(self.matrix[s][:, s], self.matrix[s])  # [k, d]
        self.rows -= self.rows[:, s] @ step
        self.matrix -= self.matrix[:, s] @ step
