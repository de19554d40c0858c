"""Patterns: which weights go together, and from scores which of them stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gracile.errors import ConfigError, DataError


class Member(Protocol):
    """One tensor axis of a group of tied axes.

    tensor: its name. axis: of the tensor. positions: [units, k], the k indices of that axis which belong to each unit.
    role: "producer" where the tensor computes the units, "consumer" where it reads them.
    """

    @property
    def tensor(self) -> str: ...
    @property
    def axis(self) -> int: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class Unstructured:
    """Single weights, anywhere in the tensor.

    With a threshold ε, a weight goes if its score is strictly below ε; for `Magnitude` that is |w| < ε, whatever its
    power.
    """

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """True where a weight stays; exactly round(sparsity · n) are False, of equal scores the lower index first."""
        if not 0 <= sparsity <= 1:
            raise ConfigError(f"Unstructured: a sparsity of {sparsity} is impossible; it lies between 0 and 1.")
        return ~lowest(scores, round(sparsity * scores.numel()))


@dataclass(frozen=True)
class NM:
    """The `keep` highest of every `of` consecutive weights of a row; the amount is 1 − keep/of.

    A row is an index of axis 0, its columns all other axes flattened: the inputs of a linear layer; of a convolution,
    the unfolded kernel [in / groups · kh · kw], so that a group runs along kernel positions first, then channels.
    """

    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ConfigError(f"NM(keep={self.keep}, of={self.of}): keep must be at least 1 and below of.")

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """True where a weight stays; of equal scores the lower index goes first.

        sparsity: None, or the pattern's own. Raises ConfigError for another, and where groups do not divide a row.
        """
        if sparsity is not None and sparsity != self.sparsity:
            raise ConfigError(f"{self}: its sparsity is {self.sparsity:g}, not {sparsity:g}.\n  Give no amount.")
        if scores.ndim < 2 or scores[0].numel() % self.of:
            raise ConfigError(
                f"{self}: scores of shape {tuple(scores.shape)} have no rows that groups of {self.of} divide.\n"
                f"  Exclude the layer, or use Unstructured()."
            )
        _refuse_nan(scores)
        groups = scores.reshape(-1, self.of)
        gone = groups.argsort(dim=1, stable=True)[:, : self.of - self.keep]
        mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, gone, False)
        return mask.reshape(scores.shape)


@dataclass(frozen=True)
class Channels:
    """Whole channels, neurons and hidden units, cut out of every tensor that carries them.

    multiple_of: kept counts are rounded to multiples of this, where a runtime's kernels are faster for them.
    normalise: divide the scores of a group by their mean before groups are compared, as DepGraph (Fang et al. 2023,
        arXiv:2301.12900) does by default: sums over more or larger weights are not comparable as they are. False
        compares raw sums, which is right for scores that estimate the loss itself and are trusted across layers.

    With a threshold ε and `Magnitude`, a unit goes if the L2 norm of the weights that produce it (its row) is below ε
    (`unit_norms`); with another criterion, if its raw reduced score is.
    """

    multiple_of: int = 1
    normalise: bool = True
    kinds: ClassVar[frozenset[str]] = frozenset({"channels", "hidden"})

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ConfigError(f"Channels(multiple_of={self.multiple_of}): at least 1 is needed.")

    def unit_scores(self, members: Iterable[Member], scores: Mapping[str, Tensor]) -> Tensor:
        """`reduce_scores`, made comparable between groups if `normalise`."""
        reduced = reduce_scores(members, scores)
        return mean_normalised(reduced) if self.normalise else reduced


@dataclass(frozen=True)
class Heads:
    """Whole attention heads, cut out of the query, key, value and output projections.

    normalise: as for `Channels`.
    """

    normalise: bool = True
    kinds: ClassVar[frozenset[str]] = frozenset({"heads"})

    def unit_scores(self, members: Iterable[Member], scores: Mapping[str, Tensor]) -> Tensor:
        """`reduce_scores`, made comparable between groups if `normalise`."""
        reduced = reduce_scores(members, scores)
        return mean_normalised(reduced) if self.normalise else reduced


@dataclass(frozen=True)
class Layers:
    """Whole residual blocks x + f(x), taken out of the model, so that x goes on as it is.

    Chosen by what leaving them out does to the model's outputs, one after another: each time the block that costs least
    beside those that are gone already. The cost is the KL divergence of logits [n, classes] from the original's, of
    other outputs the relative squared error. A criterion of weights plays no part in it.

    examples: calibration examples behind one measurement.
    candidates: with a repair, so many blocks, those that cost least without it, are each left out on trial and the rest
        is repaired; the one goes whose repaired model diverges least on held-out calibration batches. That takes
        `candidates` repairs for each block removed. 1: the choice is made without repair.

    With a threshold ε, blocks go as long as the outputs' divergence from the original's stays below it.
    """

    examples: int = 512
    candidates: int = 4
    kinds: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("examples", "candidates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Layers({name}={value!r}): expected a whole number of at least 1.")


def reduce_scores(members: Iterable[Member], scores: Mapping[str, Tensor]) -> Tensor:
    """score[u] = Σ over the group's producers and consumers, Σ over positions of unit u and over all other axes.

    scores: tensor name -> elementwise scores; members whose tensor is absent (biases, norms) do not count.
    Returns [units] float64. Raises ConfigError where no member has scores.
    """
    total = None
    for member in members:
        if member.tensor not in scores:
            continue
        values = scores[member.tensor].movedim(member.axis, 0)
        per_index = values.reshape(values.shape[0], -1).sum(dim=1, dtype=torch.float64)
        units = per_index[member.positions.to(per_index.device)].sum(dim=1)
        total = units if total is None else total + units
    if total is None:
        raise ConfigError("A group has no weights with scores, so its units cannot be ranked.\n  Exclude it.")
    _refuse_nan(total)
    return total


def unit_norms(members: Iterable[Member], weights: Mapping[str, Tensor]) -> Tensor:
    """norm[u] = √(Σ w²) over the weights that produce unit u: [units] float64."""
    squares = {name: weight.detach().double().square() for name, weight in weights.items()}
    return reduce_scores([m for m in members if m.role == "producer"], squares).sqrt()


def mean_normalised(scores: Tensor) -> Tensor:
    """scores / mean(scores); all-zero scores stay zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at exactly the `count` lowest scores, of equal ones the lower flat index first. NaN raises DataError."""
    _refuse_nan(scores)
    flat = scores.reshape(-1)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.reshape(scores.shape)


def _refuse_nan(scores: Tensor) -> None:
    if bool(torch.isnan(scores).any()):
        raise DataError(
            "Scores are NaN, so nothing can be ranked by them.\n"
            "  The weights or the statistics behind them are not finite: check the checkpoint and the calibration data."
        )
