"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracile.layer_stats import LayerStats


@dataclass(frozen=True)
class Random:
    """score = uniform noise in [0, 1), the same for the same seed and weight, different for different weights."""

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor:
        # The weight's own bytes enter the seed, or layers of one shape would all lose the same positions.
        content = weight.detach().float().cpu().contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed & 0xFFFFFFFF))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
