"""OBS: what removing a weight or a unit costs its layer's output once the remaining weights have made up for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.criteria.base import CannotScoreError, Consumer, Units
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class OBS:
    """ρ_S = ½ Σ_rows w_S ([H⁻¹]_SS)⁻¹ w_Sᵀ, the least increase of ½ tr(ΔW H ΔWᵀ) with the columns S at zero.

    H = (2/N) Σ x xᵀ of the layer's inputs. For a single weight this is ½ w² / [H⁻¹]_jj (Hassibi and Stork 1992, eq. 5),
    with the layer's output error for the loss, as in Optimal Brain Compression (Frantar and Alistarh 2022,
    arXiv:2208.11580). For a unit, S are the columns that read it, and units go one by one, each removal followed by the
    optimal update of weights and of H⁻¹, as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089). Here a unit's cost is the
    sum over all layers that read it, each as a fraction of that layer's output energy.

    damping: added to the diagonal of H, as a fraction of its mean.
    """

    damping: float = 0.01
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"OBS(damping={self.damping!r}): expected a positive number.")

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
        """[units] float64: what each unit cost when its turn came, raised above the one before where it cost less."""
        if not units.consumers:
            raise CannotScoreError("OBS: not all that reads it are linear or ungrouped convolution layers")
        states = [_State(c, self._inverse(c.gram)) for c in units.consumers]
        count = len(units.consumers[0].columns)
        scores = torch.empty(count, dtype=torch.float64)
        alive = torch.arange(count)
        last = 0.0
        while len(alive):
            losses = torch.stack([state.losses(alive) for state in states]).sum(0)
            lowest = int(losses.argmin())
            unit = int(alive[lowest])
            last = max(float(losses[lowest]), math.nextafter(last, math.inf))
            scores[unit] = last
            for state in states:
                state.remove(unit)
            alive = alive[alive != unit]
        return scores

    def _inverse(self, gram: Tensor) -> Tensor:
        h = gram.double().cpu()
        mean = float(h.diagonal().mean())
        ridge = self.damping * mean if mean > 0 else 1.0  # inputs that are always zero make every removal free
        inverse: Tensor = torch.linalg.inv(h + ridge * torch.eye(len(h), dtype=h.dtype))
        return (inverse + inverse.T) / 2


class _State:
    """One consumer while units go: its weight, updated, and H⁻¹ restricted to the columns that are left."""

    def __init__(self, consumer: Consumer, inverse: Tensor) -> None:
        self.weight = consumer.weight.detach().double().cpu().clone()
        self.inverse, self.columns = inverse.clone(), consumer.columns.cpu()
        gram = consumer.gram.double().cpu()
        energy = 0.5 * float(((self.weight @ gram) * self.weight).sum())
        self.energy = energy if energy > 0 else 1.0

    def losses(self, alive: Tensor) -> Tensor:
        """ρ of each unit that is left, over the layer's output energy."""
        columns = self.columns[alive]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # [units, k, k]
        w = self.weight[:, columns].permute(1, 2, 0)  # [units, k, out]
        return 0.5 * (w * torch.linalg.solve(blocks, w)).sum((1, 2)) / self.energy

    def remove(self, unit: int) -> None:
        """W −= W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S: and the same for H⁻¹."""
        s = self.columns[unit]
        step = torch.linalg.solve(self.inverse[s][:, s], self.inverse[s])  # [k, d]
        self.weight -= self.weight[:, s] @ step
        self.inverse -= self.inverse[:, s] @ step
