"""What a criterion is: how much each weight matters, from the weight and what was measured about its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats


class Criterion(Protocol):
    """(weight, stats) -> scores: elementwise, float32, of the weight's shape; higher means keep.

    needs: names of the `LayerStats` fields that it reads. Members are frozen dataclasses and pure functions; a user's
    own function serves as well once it has the attribute `needs`.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, weight: Tensor, stats: LayerStats) -> Tensor: ...


class UnitCriterion(Protocol):
    """units -> [units] scores of whole units, float64; higher means keep. For what no sum over single weights can say.

    needs: names of the statistics behind the fields of `Units` that it reads. comparable: whether scores of different
    groups compare as they are; where not, the pattern's `normalise` decides. Members are frozen dataclasses and pure
    functions, and raise CannotScoreError for units without what they read.
    """

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def comparable(self) -> bool: ...

    def unit_scores(self, units: Units) -> Tensor: ...


class CannotScoreError(ConfigError):
    """A criterion finds nothing to score a group of units by; its message says what is missing."""


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the units of a group, as a criterion with `unit_scores` sees it.

    layer: its name. weight: [out, d], unfolded. gram: [d, d], (2/N) Σ x xᵀ of its unfolded inputs, about their mean
    where the layer's bias or a batch norm behind it takes up a shift. mean: [d], of the inputs. columns: [units, k],
    the columns that read each unit.
    """

    layer: str
    weight: Tensor
    gram: Tensor
    mean: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Units:
    """A group of units, as a criterion of whole units sees it; empty or None where there is none or nobody asked.

    makers: of each weight that makes them, [units, n], the numbers that belong to each unit.
    norm_scales: γ of each batch norm that they pass, [units, k].
    consumers: the layers that read them, with moments of inputs ("gram").
    inputs: for each layer that reads them, [units, k], the mean of |x| or of x² ("input_abs_mean", "input_sq_mean") at
        the inputs that each unit feeds.
    gate_gradient_sq: [units], E[(dL/dm)²] over single examples, m = 1 a factor on everything that a unit passes on.
    """

    makers: tuple[Tensor, ...] = ()
    norm_scales: tuple[Tensor, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    gate_gradient_sq: Tensor | None = None


def statistic(criterion: Criterion, stats: LayerStats, name: str, weight: Tensor) -> Tensor:
    """The named statistic, float32, on the weight's device; ConfigError where it is absent or of another shape."""
    value = getattr(stats, name)
    who = type(criterion).__name__
    if value is None:
        raise ConfigError(
            f"{who}: the statistic '{name}' was not collected.\n"
            f"  It needs labelled data and a loss: Data(train=..., loss=gracile.losses.cross_entropy)."
        )
    if value.shape != weight.shape:
        raise ConfigError(
            f"{who}: the statistic '{name}' has shape {tuple(value.shape)}, and the weight {tuple(weight.shape)}.\n"
            f"  It was collected for another layer, or before the layer was cut: collect it again."
        )
    return value.to(weight.device).float()
