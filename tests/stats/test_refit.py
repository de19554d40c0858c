"""Refitting layers in place: against an explicit regression on hooked inputs, layer after layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.data import Data
from gracile.solvers import LeastSquares
from gracile.stats import targets as module
from gracile.stats.moments import CannotRefitError
from gracile.stats.refit import Refit, refit, refittable
from gracile.stats.targets import Targets


def batches(shape: tuple[int, ...], count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 4)).eval()


def cut(net: nn.Sequential, first: int, second: int, keep: list[int]) -> nn.Sequential:
    """By hand: output rows of one layer, input columns of the next."""
    small = copy.deepcopy(net)
    kept = torch.tensor(keep)
    small[first].weight = nn.Parameter(net[first].weight[kept].detach().clone())
    small[first].bias = nn.Parameter(net[first].bias[kept].detach().clone())
    small[second].weight = nn.Parameter(net[second].weight[:, kept].detach().clone())
    return small


def run(model: nn.Module, original: nn.Module, layers: list[str], data: list[Tensor], **settings: Any) -> None:
    summed = settings.pop("summed", ())
    sums = {name: settings.get("norms", {}).get(name, name) for name in summed}
    refit(Refit(model, targets(original, data, sums), LeastSquares(1e-9), **settings), layers)


def targets(original: nn.Module, data: list[Tensor], sums: dict[str, str] | None = None) -> Targets:
    layers = [name for name, layer in original.named_modules() if refittable(layer)]
    return Targets(original, data, Data(calibration=data), layers, torch.Generator().manual_seed(0), sums)


def regression(x: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary least squares with an intercept, by NumPy: weights [out, d] and bias [out]."""
    stacked = np.hstack([x, np.ones((len(x), 1))])
    solved = np.linalg.lstsq(stacked, target, rcond=None)[0]
    return solved[:-1].T, solved[-1]


def test_each_linear_layer_is_regressed_on_what_the_layers_before_now_give() -> None:
    original = mlp()
    model = cut(original, 0, 2, [0, 2, 3, 5, 8])
    data = batches((50, 6))
    hidden = F.relu(model[0](torch.cat(data))).detach()
    run(model, original, ["2", "4"], data)
    inputs = torch.cat(data)
    targets = original[2](F.relu(original[0](inputs))).detach()
    weight, bias = regression(hidden.numpy(), targets.numpy())
    # float32 inputs against a damping of 1e-9: agreement to about single precision times the condition of the system
    np.testing.assert_allclose(model[2].weight.detach().numpy(), weight, atol=2e-4)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), bias, atol=2e-4)
    second = F.relu(model[2](hidden)).detach()
    weight, bias = regression(second.numpy(), original(inputs).detach().numpy())
    # Units that never fire leave their weights open, so what is computed is compared.
    fitted = second.numpy() @ weight.T + bias
    np.testing.assert_allclose(model[4](second).detach().numpy(), fitted, atol=1e-4)


def test_a_strided_convolution_is_regressed_on_its_patches() -> None:
    original = convolutional()
    model = cut(original, 0, 2, [1, 2, 4, 5, 7])
    data = batches((10, 3, 8, 8))
    inputs = torch.cat(data)
    run(model, original, ["2"], data)
    patches = F.unfold(F.relu(model[0](inputs)), 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 45).detach()
    targets = original[2](F.relu(original[0](inputs))).movedim(1, -1).reshape(-1, 5).detach()
    weight, bias = regression(patches.numpy(), targets.numpy())
    np.testing.assert_allclose(model[2].weight.detach().flatten(1).numpy(), weight, atol=2e-4)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), bias, atol=2e-4)


def test_a_layer_that_lost_outputs_aims_at_those_it_still_has() -> None:
    original = mlp()
    model = cut(original, 2, 4, [0, 3, 4, 6])
    before = copy.deepcopy(model)
    run(model, original, ["2"], batches((50, 6)), kept={"2": torch.tensor([0, 3, 4, 6])})
    # Its inputs are untouched, so the best weights for the rows that stay are the rows themselves.
    torch.testing.assert_close(model[2].weight, before[2].weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(model[2].bias, before[2].bias, atol=1e-5, rtol=0)


def test_zeros_stay_zero_and_the_bias_of_a_sparse_layer_stays() -> None:
    original = mlp()
    model = cut(original, 0, 2, [0, 2, 3, 5, 8])
    with torch.no_grad():
        model[2].weight[::2, 1] = 0
    zeros, bias = model[2].weight == 0, model[2].bias.detach().clone()
    before = model[2].weight.detach().clone()
    run(model, original, ["2"], batches((50, 6)))
    assert bool((model[2].weight[zeros] == 0).all())
    assert not torch.equal(model[2].weight, before)
    assert torch.equal(model[2].bias, bias)


def test_few_rows_are_drawn_of_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the positions the fit is another one, yet close: the draw is of the same positions in both."""
    original = convolutional()
    whole, part = (cut(original, 0, 2, [1, 2, 4, 5, 7]) for _ in range(2))
    data = batches((40, 3, 8, 8))
    run(whole, original, ["2"], data)
    monkeypatch.setattr(module, "ROWS", 6 * 200)
    run(part, original, ["2"], data)
    a, b = whole[2].weight.detach(), part[2].weight.detach()
    difference = float((a - b).norm() / a.norm())
    assert 0 < difference < 0.5


def test_the_rest_of_the_forward_is_not_run_and_hooks_are_gone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.reached = nn.Linear(4, 4), nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.reached += 1
            out: Tensor = self.second(x)
            return out

    original = Counting().eval()
    model = copy.deepcopy(original)
    run(model, original, ["first"], batches((8, 4), 2))
    assert model.reached == 1  # once, to see in which order it calls its layers
    assert not model.first._forward_pre_hooks and not original.first._forward_pre_hooks


class Block(nn.Module):
    """x + f(x), with or without a batch norm at the end of f."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(5, 6), nn.Linear(6, 12)
        self.outer = nn.Linear(12, 6, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 2)

    def stream(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return x + self.norm(self.outer(F.relu(self.inner(x))))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stream(x))
        return out


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_in_a_residual_block_the_sum_is_regressed_not_the_branch(norm: bool) -> None:
    torch.manual_seed(3)
    original = Block(norm).eval()
    if norm:
        with torch.no_grad():
            original.norm.running_var.uniform_(0.5, 2.0)
            original.norm.weight.uniform_(-2.0, 2.0)
            original.norm.running_mean.normal_()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight += 0.2 * torch.randn(6, 5)  # what a cut further up leaves behind
    data = batches((80, 5))
    x = torch.cat(data)
    hidden = F.relu(model.stem(x)).detach()
    inner = F.relu(model.inner(hidden)).detach()
    target = (original.stream(x) - hidden).detach().numpy()
    weight, bias = regression(inner.numpy(), target)
    norms = {"outer": "norm"} if norm else {}
    run(model, original, ["outer"], data, norms=norms, summed=("outer",))
    branch = model.norm(model.outer(inner)).detach().numpy()
    # float32 against NumPy's float64
    np.testing.assert_allclose(branch, inner.numpy() @ weight.T + bias, atol=2e-4)


def test_without_a_bias_the_batch_norm_takes_up_the_mean() -> None:
    torch.manual_seed(5)
    original = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)).eval()
    model = cut(nn.Sequential(*original[:2], nn.Linear(8, 4)), 0, 2, [0, 3, 4, 6, 7])
    small = nn.Sequential(model[0], nn.ReLU(), nn.Linear(5, 4, bias=False), copy.deepcopy(original[3])).eval()
    with torch.no_grad():
        small[2].weight.copy_(original[2].weight[:, [0, 3, 4, 6, 7]])
    data = batches((60, 6))
    run(small, original, ["2"], data, norms={"2": "3"})
    x = torch.cat(data)
    torch.testing.assert_close(small(x).mean(0), original(x).mean(0), atol=1e-5, rtol=0)  # float32 sums


def test_with_columns_the_regression_is_on_these_alone() -> None:
    original = mlp()
    model = copy.deepcopy(original)
    data = batches((50, 6))
    repair = Refit(model, targets(original, data), LeastSquares(1e-9))
    columns = torch.tensor([1, 2, 6, 9])
    repair.solve("2", repair.measure("2"), columns)
    hidden = F.relu(original[0](torch.cat(data))).detach()
    weight, bias = regression(hidden[:, columns].numpy(), original[2](hidden).detach().numpy())
    np.testing.assert_allclose(model[2].weight.detach()[:, columns].numpy(), weight, atol=2e-4)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), bias, atol=2e-4)
    others = [i for i in range(10) if i not in columns.tolist()]
    assert bool((model[2].weight[:, others] == 0).all())


class Routed(nn.Module):
    """A layer that reads only the rows whose first feature is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        chosen = x[:, 0] > 0
        out: Tensor = self.head(x.index_put((chosen,), self.expert(x[chosen])))
        return out


def test_a_layer_that_gets_other_tokens_by_now_is_left_and_named() -> None:
    torch.manual_seed(0)
    original = Routed().eval()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.bias[0] += 0.5
    data = batches((50, 4), 3)
    repair = Refit(model, targets(original, data), LeastSquares(1e-9))
    with pytest.raises(CannotRefitError, match="expert reads"):
        repair.measure("expert")
    before = model.expert.weight.detach().clone()
    skipped = refit(repair, ["expert", "head"])
    assert list(skipped) == ["expert"] and torch.equal(model.expert.weight, before)
    assert not torch.equal(model.head.weight, original.head.weight)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv2d(2, 2, 3), True),
        (nn.Conv1d(2, 2, 3, padding=1), True),
        (nn.Conv2d(2, 2, 3, groups=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(2, 2, 3, padding="same"), False),
        (nn.ConvTranspose2d(2, 2, 3), False),
        (nn.Embedding(2, 2), False),
    ],
    ids=repr,
)
def test_which_layers_can_be_refitted(layer: nn.Module, expected: bool) -> None:
    assert refittable(layer) is expected
