"""What every criterion must satisfy. A new criterion joins by one row of MEMBERS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gracile.criteria import OBS, Criterion, Gradient, Hessian, Magnitude, Random, Taylor
from gracile.errors import ConfigError
from gracile.layer_stats import ACTIVATION_STATS, GRADIENT_STATS, LayerStats


@dataclass(frozen=True)
class Member:
    criterion: Criterion
    follows_permutation: bool = True  # False where the score depends on a position
    zero_is_lowest: bool = True  # a weight of 0 scores 0, and no score is below


MEMBERS = [
    Member(Magnitude()),
    Member(Magnitude(power=2.0)),
    Member(Gradient()),
    Member(Taylor()),
    Member(Hessian()),
    Member(Hessian(hutchinson_probes=1)),
    Member(OBS()),
    Member(Random(seed=3), follows_permutation=False, zero_is_lowest=False),
]

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(m.criterion))


def layer(shape: tuple[int, ...] = (6, 4, 3, 3), seed: int = 0) -> tuple[Tensor, LayerStats]:
    """A weight with some zeros, and every statistic of a weight's shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.2] = 0.0
    gradient, noise, curvature = (torch.randn(shape, generator=generator) for _ in range(3))
    inputs = torch.randn(3 * weight[0].numel(), weight[0].numel(), generator=generator, dtype=torch.float64)
    gram = 2 * inputs.T @ inputs / len(inputs)
    return weight, LayerStats(
        gradient=gradient,
        gradient_sq=gradient.square() + noise.square(),
        hessian_diagonal=curvature,
        gram=gram[None],
        examples=8,
    )


@each_member
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (1, 1), (12, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_finite_float32_of_the_weights_shape(
    member: Member, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, stats = layer(shape)
    scores = member.criterion(weight.to(dtype), stats)
    assert scores.shape == weight.shape
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


@each_member
def test_pure_and_the_same_twice(member: Member) -> None:
    weight, stats = layer()
    parameter = torch.nn.Parameter(weight.clone())
    first = member.criterion(parameter, stats)
    second = member.criterion(parameter, stats)
    assert torch.equal(first, second)
    assert torch.equal(parameter.detach(), weight)
    assert not first.requires_grad


@each_member
def test_permuting_the_weights_permutes_the_scores(member: Member) -> None:
    if not member.follows_permutation:
        pytest.skip("depends on the position by definition")
    weight, stats = layer()
    order = torch.tensor([2, 0, 3, 1])
    columns = torch.arange(weight[0].numel()).reshape(weight.shape[1:])[order].flatten()
    moved = replace(
        stats,
        gram=stats.gram[:, columns][:, :, columns],
        **{name: getattr(stats, name)[:, order] for name in ("gradient", "gradient_sq", "hessian_diagonal")},
    )
    found, expected = member.criterion(weight[:, order], moved), member.criterion(weight, stats)[:, order]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # an inverse sums in another order


@each_member
def test_a_zero_weight_is_never_above_another(member: Member) -> None:
    if not member.zero_is_lowest:
        pytest.skip("does not look at the weight's size")
    weight, stats = layer()
    scores = member.criterion(weight, stats)
    assert bool((scores[weight == 0] == 0).all())
    assert bool((scores >= 0).all())
    assert bool((scores > 0).any())


@each_member
def test_the_sign_of_the_weights_does_not_count(member: Member) -> None:
    if not member.zero_is_lowest:
        pytest.skip("does not look at the weight's size")
    weight, stats = layer()
    assert torch.equal(member.criterion(-weight, stats), member.criterion(weight, stats))


@each_member
def test_what_it_needs_is_a_known_statistic_and_its_absence_is_named(member: Member) -> None:
    assert member.criterion.needs <= ACTIVATION_STATS | GRADIENT_STATS
    weight, stats = layer()
    for name in member.criterion.needs:
        with pytest.raises(ConfigError, match=f"'{name}' was not collected"):
            member.criterion(weight, replace(stats, **{name: None}))
        with pytest.raises(ConfigError, match="has shape"):
            member.criterion(weight[:, :2], stats)


@each_member
def test_needs_is_all_it_reads(member: Member) -> None:
    weight, stats = layer()
    only = LayerStats(**{name: getattr(stats, name) for name in member.criterion.needs})
    assert torch.equal(member.criterion(weight, only), member.criterion(weight, stats))
