"""What every criterion of whole units must satisfy. A new one joins by one row of MEMBERS."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.criteria import FPGM, OBS, Activation, BatchNormScale, Consumer, GateFisher, UnitCriterion, Units
from gracile.layer_stats import ACTIVATION_STATS, GATE_STATS, GRADIENT_STATS


@dataclass(frozen=True)
class Member:
    criterion: UnitCriterion
    reads: str  # the field of Units
    dead_is_lowest: bool = True  # a unit whose numbers are all zero scores lowest


MEMBERS = [
    Member(BatchNormScale(), "norm_scales"),
    Member(Activation(), "inputs"),
    Member(Activation(power=2), "inputs"),
    Member(FPGM(), "makers", dead_is_lowest=False),
    Member(GateFisher(), "gate_gradient_sq"),
    Member(OBS(), "consumers"),
]
each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(m.criterion))
COUNT = 8
ORDER = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])


def units(dtype: torch.dtype = torch.float32, order: Tensor | None = None) -> Units:
    """Eight units with everything that is known of a group; unit 2 is dead. order: the same units in another order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(COUNT) if order is None else order

    def per_unit(k: int) -> Tensor:
        values = torch.randn(COUNT, k, generator=generator)
        values[2] = 0
        return values[order].to(dtype)

    makers, scales, inputs = (per_unit(12), per_unit(9)), (per_unit(1),), (per_unit(3).abs(), per_unit(1).abs())
    gates = per_unit(1)[:, 0].double().square()
    rows = torch.randn(200, 2 * COUNT, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 2 * COUNT, generator=generator)
    columns = torch.arange(2 * COUNT).reshape(COUNT, 2)
    weight[:, columns[2]] = 0
    consumer = Consumer("next", weight.to(dtype), 2 * rows.T @ rows / 200, rows.mean(0), columns[order])
    return Units(makers, scales, (consumer,), inputs, gates)


@each_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_finite_float64_score_for_each_unit(member: Member, dtype: torch.dtype) -> None:
    scores = member.criterion.unit_scores(units(dtype))
    assert scores.shape == (COUNT,)
    assert scores.dtype == torch.float64
    assert torch.isfinite(scores).all() and bool((scores >= 0).all()) and bool((scores > 0).any())


@each_member
def test_pure_and_the_same_twice(member: Member) -> None:
    given = units()
    before = copy.deepcopy(given)
    assert torch.equal(member.criterion.unit_scores(given), member.criterion.unit_scores(given))
    for field in dataclasses.fields(Units):
        for a, b in zip(tensors(getattr(given, field.name)), tensors(getattr(before, field.name)), strict=True):
            assert torch.equal(a, b)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Consumer):
        return [value.weight, value.gram, value.mean, value.columns]
    return [t for item in (value or ()) for t in tensors(item)]  # type: ignore[attr-defined]


@each_member
def test_other_order_of_the_units_gives_the_scores_in_that_order(member: Member) -> None:
    found = member.criterion.unit_scores(units(order=ORDER))
    # Sums run in another order.
    torch.testing.assert_close(found, member.criterion.unit_scores(units())[ORDER], rtol=1e-9, atol=1e-12)


@each_member
def test_a_dead_unit_goes_first(member: Member) -> None:
    if not member.dead_is_lowest:
        pytest.skip("does not look at the unit's size")
    assert int(member.criterion.unit_scores(units()).argmin()) == 2


@each_member
def test_it_reads_one_field_and_says_so_where_that_is_missing(member: Member) -> None:
    alone = dataclasses.replace(Units(), **{member.reads: getattr(units(), member.reads)})
    assert torch.equal(member.criterion.unit_scores(alone), member.criterion.unit_scores(units()))
    with pytest.raises(gc.ConfigError, match=type(member.criterion).__name__):
        member.criterion.unit_scores(Units())
    assert member.criterion.needs <= ACTIVATION_STATS | GRADIENT_STATS | GATE_STATS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
        nn.init.uniform_(self.norm.weight, 0.2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@each_member
def test_it_prunes_channels_and_leaves_those_it_scores_highest(member: Member) -> None:
    model = Net().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 2, 5, 5, generator=generator), torch.arange(6) % 3) for _ in range(4)]
    data = gc.Data(calibration=[x for x, _ in batches], train=batches, loss=gc.losses.cross_entropy)
    original = copy.deepcopy(model)
    step = gc.only("first", gc.Prune(0.5, pattern=gc.Channels(), criterion=member.criterion, correct=False))
    step.check(model, Context(data, original, original))
    record = step(model, Context(data, original, original))
    assert [(r.name, r.kept, r.of) for r in record.layers if r.action == "cut"] == [("first", 4, 8)]
    assert model.first.out_channels == model.norm.num_features == model.second.in_channels == 4
    again = copy.deepcopy(original)
    assert step(again, Context(data, original, original)).edits == record.edits


@each_member
def test_single_weights_are_pruned_only_by_a_criterion_that_scores_them(member: Member) -> None:
    if callable(member.criterion):
        pytest.skip("scores single weights too")
    with pytest.raises(gc.ConfigError, match="scores whole units"):
        gc.Prune(0.5, criterion=member.criterion)
