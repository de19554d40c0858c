"""What is known of a model when the first of its layers is about to be quantized."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn

from gracile.errors import NothingChangedError
from gracile.formats import Scheme
from gracile.graph import Trace
from gracile.recipe import Recorder
from gracile.steps.quantization.quantize_layers import Encoder


def option_title(scheme: Scheme | None) -> str:
    """What the report calls an option of a layer; None: to stay in floating point."""
    return "floating point" if scheme is None else scheme.name


@dataclass(frozen=True)
class Prepared:
    """A model about to be quantized: its layers, those of them with one weight, schemes, and what was seen of it.

    reference: the float model that the result is compared with, or None. traced: None where nothing needs it. floats:
    whether layers may stay in floating point.
    """

    layers: list[str]
    recurrent: list[str]
    tied: list[list[str]]
    schemes: dict[str, tuple[Scheme, ...]]
    encoder: Encoder
    traced: Trace | None
    reference: nn.Module | None
    floats: bool = False

    @property
    def units(self) -> dict[str, list[str]]:
        """Layers that take one format, by the first of them: those that hold one weight, and every other by itself."""
        tied = [[name for name in group if name in self.layers] for group in self.tied]
        together = {name for group in tied for name in group}
        alone = [[name] for name in (*self.layers, *self.recurrent) if name not in together]
        return {group[0]: group for group in (*tied, *alone) if group}

    @property
    def options(self) -> dict[str, tuple[Scheme | None, ...]]:
        """The schemes that each unit may take, by its first layer; None: to stay in floating point."""
        return {name: (*self.schemes[name], *([None] if self.floats else [])) for name in self.units}

    def without(self, layers: Collection[str], model: nn.Module, recorder: Recorder) -> Prepared:
        """What is left where these layers stay in floating point, which is recorded."""
        for name in layers:
            recorder.skip(
                name, type(model.get_submodule(name)).__name__, "stays in floating point: the budget allows it"
            )
        if len(layers) == len(self.schemes):
            raise NothingChangedError("Quantize: the budget leaves all layers in floating point.\n  Ask for less.")
        kept = [[name for name in names if name not in layers] for names in (self.layers, self.recurrent)]
        return replace(self, layers=kept[0], recurrent=kept[1], tied=[g for g in self.tied if g[0] not in layers])
