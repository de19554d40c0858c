"""Normalisations as layers that are linear in their factors, and their refit: against NumPy's regressions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.data import Data
from gracile.solvers import LeastSquares
from gracile.stats.norms import has_factors, normalised
from gracile.stats.refit import Refit, refit
from gracile.stats.targets import Targets


class OnePlus(nn.Module):
    """A root-mean-square norm whose factors count from one, as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


def layer_norm(bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(6, bias=bias)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm


@pytest.mark.parametrize("norm", [layer_norm(), layer_norm(bias=False), nn.RMSNorm(6), OnePlus(6)])
def test_the_output_is_taken_apart_into_factors_and_what_they_multiply(norm: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6)
    assert has_factors(norm)
    found = normalised(norm, x)
    assert found is not None
    n, offset = found
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(offset + norm.weight * n + (0 if bias is None else bias), norm(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(6),  # has a stored mean and variance
        nn.Linear(6, 6),
        nn.LayerNorm((4, 6)),  # factors of two axes
        nn.LayerNorm(6, elementwise_affine=False),
        nn.Sequential(nn.LayerNorm(6)),
    ],
)
def test_other_modules_have_no_factors(module: nn.Module) -> None:
    assert not has_factors(module)


def test_a_norm_whose_channels_are_not_last_is_told_by_what_it_computes() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    assert normalised(norm, torch.randn(3, 6, 4)) is None
    assert normalised(norm, torch.randn(3, 6, 6)) is None  # of the right size by chance


def test_an_output_that_is_not_affine_in_the_factors_is_refused() -> None:
    class Squared(OnePlus):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.square()

    assert has_factors(Squared(6)) and normalised(Squared(6), torch.randn(3, 6)) is None


@pytest.mark.parametrize("norm", [layer_norm(), layer_norm(bias=False), OnePlus(6)])
@pytest.mark.parametrize("kept", [None, [0, 2, 3, 5]])
def test_each_factor_is_regressed_on_its_channel_alone(norm: nn.Module, kept: list[int] | None) -> None:
    """By NumPy: slope, and intercept where there is a bias, of every channel that is left."""
    torch.manual_seed(0)
    data = [torch.randn(30, 4) for _ in range(3)]
    original = nn.Sequential(nn.Linear(4, 6), norm).eval()
    model = copy.deepcopy(original)
    rows = list(range(6)) if kept is None else kept
    with torch.no_grad():
        model[0].weight.add_(0.5 * torch.randn(6, 4))
        if kept is not None:
            model[0] = nn.Linear(4, len(kept))
            model[1] = nn.LayerNorm(len(kept), bias=norm.bias is not None) if isinstance(norm, nn.LayerNorm) else norm
            if isinstance(norm, OnePlus):
                model[1] = OnePlus(len(kept))
    targets = Targets(original, data, Data(calibration=data), ["1"], torch.Generator().manual_seed(0))
    columns = {} if kept is None else {"1": torch.tensor(kept)}
    assert refit(Refit(model, targets, LeastSquares(1e-9), kept=columns), ["1"]) == {}
    x = torch.cat(data)
    y = original(x)[:, rows].detach().double().numpy()
    hidden = model[0](x).detach().double().numpy()
    has_bias = getattr(norm, "bias", None) is not None
    if isinstance(norm, OnePlus):
        n = hidden / np.sqrt(np.square(hidden).mean(1, keepdims=True))
        y = y - n
    else:
        n = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    for i in range(len(rows)):
        columns_of = np.stack([n[:, i], np.ones(len(n))], 1) if has_bias else n[:, i : i + 1]
        solved = np.linalg.lstsq(columns_of, y[:, i], rcond=None)[0]
        # float32 forwards on one side
        np.testing.assert_allclose(model[1].weight[i].item(), solved[0], atol=1e-4)
        if has_bias:
            np.testing.assert_allclose(model[1].bias[i].item(), solved[1], atol=1e-4)


def test_what_a_norm_gives_to_a_sum_makes_good_the_streams_error() -> None:
    class Sandwich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), layer_norm()

        def forward(self, x: Tensor) -> Tensor:
            stream = self.first(x)
            return stream + self.norm(self.inner(stream))

    torch.manual_seed(0)
    original = Sandwich().eval()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.first.bias.add_(0.5)  # the bias of the norm can take this back
    data = [torch.randn(200, 4)]
    targets = Targets(
        original, data, Data(calibration=data), ["norm"], torch.Generator().manual_seed(0), {"norm": "norm"}
    )
    refit(Refit(model, targets, LeastSquares(1e-9)), ["norm"])
    difference = (model(data[0]) - original(data[0])).detach()
    assert float(difference.mean(0).abs().max()) < 1e-5


def test_tokens_of_another_number_are_a_reason_not_to_refit() -> None:
    class Fewer(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.norm, self.count = layer_norm(), count

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[: self.count])

    data = [torch.randn(10, 6)]
    targets = Targets(Fewer(8).eval(), data, Data(calibration=data), ["norm"], torch.Generator().manual_seed(0))
    skipped = refit(Refit(Fewer(7).eval(), targets), ["norm"])
    assert skipped == {"norm": "norm reads 7 tokens, and 8 in the original"}
