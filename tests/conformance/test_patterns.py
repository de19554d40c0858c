"""What every pattern must satisfy. A new pattern joins by one row of MASKS (weights) or UNITS (cut out whole)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gracile.errors import DataError
from gracile.patterns import NM, Channels, Heads, Unstructured
from tests.labels import label

#: pattern, sparsity asked for (None: its own), zeros it must leave of n scores.
MASKS: list[tuple[Unstructured | NM, float | None, Callable[[int], int]]] = [
    *[(Unstructured(), s, lambda n, s=s: round(s * n)) for s in (0.0, 0.1, 1 / 3, 0.5, 0.95, 1.0)],
    (NM(2, 4), None, lambda n: n // 2),
    (NM(2, 4), 0.5, lambda n: n // 2),
    (NM(keep=1, of=4), None, lambda n: 3 * n // 4),
    (NM(keep=3, of=12), None, lambda n: 3 * n // 4),
]
UNITS = [Channels(), Channels(normalise=False), Heads(), Heads(normalise=False)]

each_mask = pytest.mark.parametrize(("pattern", "sparsity", "zeros"), MASKS, ids=label)
each_unit = pytest.mark.parametrize("pattern", UNITS, ids=label)
each_shape = pytest.mark.parametrize("shape", [(6, 12), (1, 24), (5, 4, 3, 3)])


def scores_of(shape: tuple[int, ...], kind: str) -> Tensor:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if kind == "tied":
        scores = (scores * 3).floor()
    if kind == "constant":
        scores = torch.ones(shape)
    if kind == "half zero":
        scores = scores * (scores > 0.5)
    return scores


@each_mask
@each_shape
@pytest.mark.parametrize("kind", ["distinct", "tied", "constant", "half zero"])
def test_the_number_of_zeros_is_exact_and_the_lowest_go(
    pattern: Unstructured | NM,
    sparsity: float | None,
    zeros: Callable[[int], int],
    shape: tuple[int, ...],
    kind: str,
) -> None:
    scores = scores_of(shape, kind)
    before = scores.clone()
    mask = pattern.mask(scores, sparsity)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == zeros(scores.numel())
    assert torch.equal(scores, before)
    assert torch.equal(mask, pattern.mask(scores, sparsity))
    of = pattern.of if isinstance(pattern, NM) else scores.numel()
    for group, kept in zip(scores.reshape(-1, of), mask.reshape(-1, of)):
        if kept.any() and not kept.all():
            assert group[~kept].max() <= group[kept].min()
        # Of the scores tied at the threshold, those that went come first.
        if not kept.all():
            tied = kept[group == group[~kept].max()].long()
            assert bool((tied.diff() >= 0).all())


@each_mask
def test_nan_scores_are_refused(
    pattern: Unstructured | NM, sparsity: float | None, zeros: Callable[[int], int]
) -> None:
    scores = torch.ones(2, 12)
    scores[1, 3] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        pattern.mask(scores, sparsity)


@dataclass(frozen=True)
class Tied:
    tensor: str
    axis: int
    positions: Tensor
    role: str = "producer"


@dataclass(frozen=True)
class Case:
    """A group of 3 units with 2 positions each in two tensors, and one bias without scores."""

    members: list[Tied] = field(
        default_factory=lambda: [
            Tied("first.weight", 0, torch.tensor([[0, 1], [2, 3], [4, 5]])),
            Tied("first.bias", 0, torch.tensor([[0, 1], [2, 3], [4, 5]])),
            Tied("second.weight", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]), "consumer"),
        ]
    )
    scores: dict[str, Tensor] = field(
        default_factory=lambda: {
            "first.weight": torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(1)),
            "second.weight": torch.rand(5, 6, generator=torch.Generator().manual_seed(2)),
        }
    )


@each_unit
def test_unit_scores_are_proportional_to_sums_over_all_members(pattern: Channels | Heads) -> None:
    case = Case()
    expected = []
    for unit in range(3):
        first = case.scores["first.weight"].double()[2 * unit : 2 * unit + 2].sum()
        second = case.scores["second.weight"].double()[:, unit].sum() + case.scores["second.weight"][:, unit + 3].sum()
        expected.append(float(first + second))
    scores = pattern.unit_scores(case.members, case.scores)
    scale = sum(expected) / 3 if pattern.normalise else 1.0
    assert scores.tolist() == pytest.approx([value / scale for value in expected], rel=1e-6)  # one sum is float32


@each_unit
def test_unit_scores_of_zero_stay_zero(pattern: Channels | Heads) -> None:
    case = Case()
    zeros = {name: torch.zeros_like(value) for name, value in case.scores.items()}
    assert pattern.unit_scores(case.members, zeros).tolist() == [0, 0, 0]


@each_unit
def test_which_kinds_of_units_it_cuts_is_declared(pattern: Channels | Heads) -> None:
    assert pattern.kinds
    assert pattern.kinds <= {"channels", "hidden", "heads"}
