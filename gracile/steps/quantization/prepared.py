"""What is known of a model when the first of its layers is about to be quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gracile.formats import Scheme
from gracile.graph import Trace
from gracile.steps.quantization.quantize_layers import Encoder


@dataclass(frozen=True)
class Prepared:
    """A model about to be quantized: its layers, those of them with one weight, schemes, and what was seen of it.

    reference: the float model that the result is compared with, or None. traced: None where nothing needs it.
    """

    layers: list[str]
    recurrent: list[str]
    tied: list[list[str]]
    schemes: dict[str, tuple[Scheme, ...]]
    encoder: Encoder
    traced: Trace | None
    reference: nn.Module | None

    @property
    def units(self) -> dict[str, list[str]]:
        """Layers that take one format, by the first of them: those that hold one weight, and every other by itself."""
        tied = [[name for name in group if name in self.layers] for group in self.tied]
        together = {name for group in tied for name in group}
        alone = [[name] for name in (*self.layers, *self.recurrent) if name not in together]
        return {group[0]: group for group in (*tied, *alone) if group}

    @property
    def options(self) -> dict[str, tuple[Scheme, ...]]:
        """The schemes that each unit may take, by its first layer."""
        return {name: self.schemes[name] for name in self.units}
