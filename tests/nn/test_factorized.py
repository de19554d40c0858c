"""Factorized layers: the two products of the one, built without values, loaded strictly, read like the old layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import ArtifactError
from gracile.evaluate.size import count_parameters
from gracile.nn import FactorizedConv, FactorizedLinear, build_layer, factorized_kind
from gracile.surgery import Swap, apply, edit_from_json, edit_to_json

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(12, 7), (5, 12)),
    (nn.Linear(12, 7, bias=False), (2, 3, 12)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9)),
    (nn.Conv3d(2, 6, 2), (1, 2, 4, 4, 4)),
    (nn.Linear(12, 7).double(), (5, 12)),
]
each_layer = pytest.mark.parametrize(("old", "shape"), LAYERS, ids=[repr(old) for old, _ in LAYERS])


def factorized(old: Any, rank: int) -> Any:
    """By the singular value decomposition of the weight."""
    layer: Any = build_layer(str(factorized_kind(old)), {"rank": rank}, old)
    u, s, v = torch.linalg.svd(old.weight.detach().flatten(1), full_matrices=False)
    layer.set_factors(s[:rank, None] * v[:rank], u[:, :rank])
    return layer


@each_layer
def test_of_full_rank_it_computes_what_the_layer_does(old: Any, shape: tuple[int, ...]) -> None:
    layer = factorized(old, 6)
    x = torch.randn(shape, dtype=old.weight.dtype, generator=torch.Generator().manual_seed(0))
    if len(old.weight) == 6:
        assert torch.allclose(layer(x), old(x), atol=1e-5)  # float32 products of at most 36 terms below 1
    lower = factorized(old, 2)
    twin = copy.deepcopy(old)
    twin.weight.data = lower.weight.detach()
    assert torch.allclose(lower(x), twin(x), atol=1e-5)
    assert int(torch.linalg.matrix_rank(lower.weight.detach().flatten(1).double(), rtol=1e-5)) == 2


SIDES = [old for old, _ in LAYERS if isinstance(old, nn.Conv2d) and old.padding_mode == "zeros"]


@pytest.mark.parametrize("split", ["vertical", "horizontal"])
@pytest.mark.parametrize("old", SIDES, ids=repr)
def test_split_along_the_sides_of_its_kernel_it_is_one_convolution(old: Any, split: str) -> None:
    layer: Any = build_layer("FactorizedConv", {"rank": 3, "split": split}, old)
    for each in (layer.first, layer.second):
        nn.init.normal_(each.weight)
    one = 3 if split == "vertical" else 2  # the kernel dimension that the first of both does not have
    assert layer.first.weight.shape[one] == 1 and layer.second.weight.shape[5 - one] == 1
    twin = copy.deepcopy(old)
    twin.weight.data = layer.weight.detach()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), twin(x), atol=1e-4)  # float32 sums of 12 · 9 products of about 1
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(old, name)


def test_only_two_dimensions_have_sides_to_split_along() -> None:
    for old in (nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3)):
        with pytest.raises(ArtifactError, match="cannot be split 'vertical'"):
            build_layer("FactorizedConv", {"rank": 1, "split": "vertical"}, old)
    with pytest.raises(ArtifactError, match="cannot be split 'diagonal'"):
        build_layer("FactorizedConv", {"rank": 1, "split": "diagonal"}, nn.Conv2d(4, 4, 3))


@each_layer
def test_it_is_read_like_the_old_layer_and_cannot_be_written(old: Any, shape: tuple[int, ...]) -> None:
    layer = factorized(old, 2)
    assert layer.weight.shape == old.weight.shape and layer.weight.dtype == old.weight.dtype
    assert (layer.bias is None) == (old.bias is None)
    assert old.bias is None or torch.equal(layer.bias, old.bias)
    linear = isinstance(old, nn.Linear)
    names = ("in_features", "out_features") if linear else ("in_channels", "out_channels", "groups", "padding_mode")
    names += () if linear else ("kernel_size", "stride", "padding", "dilation")
    for name in names:
        assert getattr(layer, name) == getattr(old, name)
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)
    with pytest.raises((AttributeError, TypeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(old.weight.shape))
    assert layer.first.bias is None and "weight" not in dict(layer.named_parameters())


@each_layer
def test_its_edit_and_state_rebuild_it(old: Any, shape: tuple[int, ...]) -> None:
    model, other = nn.Sequential(factorized(old, 3)), nn.Sequential(copy.deepcopy(old))
    apply(other, [edit_from_json(edit_to_json(Swap("0", str(factorized_kind(old)), {"rank": 3})))])
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(shape, dtype=old.weight.dtype)
    assert torch.equal(model(x), other(x))


def test_both_factors_and_the_bias_are_trained_and_frozen_as_the_layer_was() -> None:
    old = nn.Linear(6, 5)
    layer = factorized(old, 2)
    layer(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters()) and len(list(layer.parameters())) == 3
    old.weight.requires_grad_(False)
    frozen = factorized(old, 2)
    assert [p.requires_grad for p in (frozen.first.weight, frozen.second.weight, frozen.bias)] == [False, False, True]


def test_the_product_counts_among_no_weights() -> None:
    layer = factorized(nn.Linear(6, 5), 2)
    assert count_parameters(nn.Sequential(layer)).total == 2 * (6 + 5) + 5


def test_a_second_step_reads_the_sizes_that_a_cut_leaves() -> None:
    layer = factorized(nn.Conv2d(4, 6, 3), 3)
    layer.second = nn.Conv2d(3, 2, 1)
    assert layer.out_channels == 2 and layer.weight.shape == (2, 4, 3, 3)


def test_what_nothing_stands_for() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.relu(super().forward(input))

    assert factorized_kind(Own(3, 3)) is None
    assert factorized_kind(nn.Conv2d(4, 4, 3, groups=2)) is None
    assert factorized_kind(nn.ConvTranspose2d(4, 4, 3)) is None
    assert factorized_kind(nn.Embedding(3, 3)) is None
    assert type(build_layer("FactorizedLinear", {"rank": 1}, nn.Linear(3, 3))) is FactorizedLinear
    assert type(build_layer("FactorizedConv", {"rank": 1}, nn.Conv2d(3, 3, 3))) is FactorizedConv


@pytest.mark.parametrize("config", [{}, {"rank": 0}, {"rank": 2.0}, {"rank": True}, {"rank": "2"}])
def test_an_impossible_rank_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        build_layer("FactorizedLinear", config, nn.Linear(3, 3))


def test_a_layer_of_another_kind_is_refused() -> None:
    with pytest.raises(ArtifactError, match="groups"):
        build_layer("FactorizedConv", {"rank": 1}, nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ArtifactError, match="cannot stand for"):
        build_layer("FactorizedLinear", {"rank": 1}, nn.Conv2d(4, 4, 3))
