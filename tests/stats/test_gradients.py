from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.losses import cross_entropy
from gracile.stats.gradients import collect_gradients

ALL = ("gradient", "gradient_sq", "hessian_diagonal")


def labelled(shape: tuple[int, ...], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(0, classes, shape[:1], generator=generator)


def test_a_linear_classifier_equals_the_formula_in_numpy() -> None:
    """dL/dW of one example is (softmax(Wx + b) − y) xᵀ."""
    net = nn.Sequential(nn.Linear(5, 3)).double()
    x, y = labelled((11, 5), 3)
    x = x.double()
    found = collect_gradients(
        net, ["0.weight", "0.bias"], ALL[:2], Data(train=[(x[:4], y[:4]), (x[4:], y[4:])], loss=cross_entropy)
    )
    w, b = net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    z = x.numpy() @ w.T + b
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    delta = p - np.eye(3)[y.numpy()]
    each = delta[:, :, None] * x.numpy()[:, None, :]
    # Stored as float32, as sums of examples of about one.
    np.testing.assert_allclose(found["0.weight"].gradient, each.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["0.weight"].gradient_sq, (each**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["0.bias"].gradient_sq, (delta**2).mean(0), rtol=1e-5)
    assert found["0.weight"].examples == 11
    assert found["0.weight"].gradient is not None and found["0.weight"].gradient.dtype == torch.float32


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.fc, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))
        return y


def test_mean_and_squares_equal_a_loop_over_examples_whatever_the_batches() -> None:
    net = Small().train()
    x, y = labelled((9, 1, 6, 6), 3)
    names = ["conv.weight", "fc.weight", "unused.weight"]
    found = collect_gradients(net, names, ALL[:2], Data(train=[(x[:7], y[:7]), (x[7:], y[7:])], loss=cross_entropy))
    net.eval()
    each: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(9):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for name in names[:2]:
            each[name].append(net.get_parameter(name).grad.clone())  # type: ignore[union-attr]
    for name in names[:2]:
        rows = torch.stack(each[name])
        # Float32 sums of nine terms in another order.
        np.testing.assert_allclose(found[name].gradient, rows.mean(0), atol=1e-6)
        np.testing.assert_allclose(found[name].gradient_sq, rows.square().mean(0), rtol=1e-4, atol=1e-9)
    assert found["unused.weight"].gradient is not None and not found["unused.weight"].gradient.any()


def test_the_mean_alone_takes_whole_batches_and_weighs_them_by_their_size() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = labelled((10, 4), 3)
    passes: list[int] = []
    data = Data(train=[(x[:7], y[:7]), (x[7:], y[7:])], loss=cross_entropy)
    found = collect_gradients(net, ["0.weight"], ["gradient"], data, on_example=passes.append)["0.weight"]
    F.cross_entropy(net(x), y).backward()
    np.testing.assert_allclose(found.gradient, net[0].weight.grad, atol=1e-6)
    assert passes == [7, 10]
    assert found.gradient_sq is None


@pytest.mark.parametrize("limit", [1, 5, 6, 100])
def test_only_the_first_examples_count(limit: int) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = labelled((8, 4), 3)
    data = Data(train=[(x[:5], y[:5]), (x[5:], y[5:])], loss=cross_entropy)
    n = min(limit, 8)
    for needs in (["gradient"], ["gradient", "gradient_sq"]):
        found = collect_gradients(net, ["0.weight"], needs, data, examples=limit)["0.weight"]
        assert found.examples == n
        net.zero_grad()
        F.cross_entropy(net(x[:n]), y[:n]).backward()
        np.testing.assert_allclose(found.gradient, net[0].weight.grad, atol=1e-6)


class Vector(nn.Module):
    """Outputs its parameter for every example, so that a loss can be any function of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


def quadratic(matrix: Tensor) -> Any:
    return lambda outputs, batch: 0.5 * outputs[0] @ matrix @ outputs[0]


def test_one_probe_is_exact_for_a_diagonal_hessian() -> None:
    h = torch.tensor([3.0, -1.0, 0.5, 0.0])
    data = Data(train=[(torch.ones(4, 1), torch.zeros(4))], loss=quadratic(torch.diag(h)))
    found = collect_gradients(Vector(4), ["w"], ["hessian_diagonal"], data)["w"].hessian_diagonal
    np.testing.assert_allclose(found, h, atol=1e-6)


def test_many_probes_approach_the_diagonal_of_a_full_hessian() -> None:
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    h = a @ a.T
    data = Data(train=[(torch.ones(2, 1), torch.zeros(2))], loss=quadratic(h))
    probes = 4000
    found = collect_gradients(
        Vector(6),
        ["w"],
        ["hessian_diagonal"],
        data,
        probes=probes,
        generator=torch.Generator().manual_seed(0),
    )["w"].hessian_diagonal
    # Var[v_i (Hv)_i] = Σ_{j≠i} h_ij² for ±1 entries; five standard errors of the mean.
    error = (h.square().sum(1) - h.diagonal().square()).sqrt() / probes**0.5
    assert found is not None and bool(((found - h.diagonal()).abs() < 5 * error).all())
    assert bool((error < 0.1 * h.diagonal()).all())  # or the bound would say little


def test_batches_weigh_by_their_examples_in_the_hessian() -> None:
    """L = ½ w² · mean(x), so the curvature is the mean of x over all examples."""
    data = Data(
        train=[(torch.full((6, 1), 1.0), torch.zeros(6)), (torch.full((2, 1), 9.0), torch.zeros(2))],
        loss=lambda outputs, batch: (0.5 * outputs.square() * batch[0]).mean(),
    )
    found = collect_gradients(Vector(1), ["w"], ["hessian_diagonal"], data)["w"].hessian_diagonal
    assert found is not None and found.item() == pytest.approx((6 * 1 + 2 * 9) / 8)


def test_a_loss_without_curvature_has_a_hessian_of_zero() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    data = Data(train=[labelled((4, 3), 2)], loss=lambda outputs, batch: outputs.mean())
    found = collect_gradients(net, ["0.weight"], ["hessian_diagonal"], data)["0.weight"].hessian_diagonal
    assert found is not None and not found.any()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)
        return y


def test_fused_attention_has_second_derivatives() -> None:
    net = Attention().double()
    x, y = labelled((3, 5, 8), 3)
    probes = 64
    found = collect_gradients(
        net,
        ["out.weight"],
        ["hessian_diagonal"],
        Data(train=[(x.double(), y)], loss=cross_entropy),
        probes=probes,
        generator=torch.Generator().manual_seed(0),
    )["out.weight"].hessian_diagonal

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, {"out.weight": weight.reshape(3, 8)}, x.double()), y)

    h = torch.autograd.functional.hessian(loss, net.out.weight.detach().flatten())
    assert isinstance(h, Tensor)
    error = (h.square().sum(1) - h.diagonal().square()).sqrt() / probes**0.5  # of a mean of ±1 probes
    assert found is not None and bool(((found.flatten() - h.diagonal()).abs() < 5 * error).all())


def test_flags_modes_and_gradients_are_as_before_also_after_an_error() -> None:
    net = Small().train()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    net.fc.bias.grad = torch.full((3,), 7.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = labelled((4, 1, 6, 6), 3)
    collect_gradients(net, ["conv.weight"], ALL, Data(train=[(x, y)], loss=cross_entropy))
    bad = Data(train=[(x * float("nan"), y)], loss=cross_entropy)
    with pytest.raises(DataError, match="not finite"):
        collect_gradients(net, ["conv.weight"], ["gradient"], bad)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert net.training and not net.norm.training and net.drop.training
    assert net.fc.bias.grad.tolist() == [7.0] * 3 and net.conv.weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_gradients_flow_even_where_the_caller_turned_them_off() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    data = Data(train=[labelled((4, 4), 3)], loss=cross_entropy)
    with torch.no_grad():
        found = collect_gradients(net, ["0.weight"], ALL, data)["0.weight"]
    assert found.gradient is not None and found.gradient.any()


def test_tied_weights_get_the_sum_under_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.tanh(self.a(x)))
            return y

    net = Tied()
    x, y = labelled((5, 3), 3)
    data = Data(train=[(x, y)], loss=cross_entropy)
    F.cross_entropy(net(x), y).backward()
    for name in ("a.weight", "b.weight"):
        found = collect_gradients(net, [name], ["gradient"], data)[name].gradient
        np.testing.assert_allclose(found, net.a.weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(train=[labelled((2, 4), 3)]), "needs labelled data and a loss"),
        (Data(calibration=[torch.ones(1, 4)], loss=cross_entropy), "needs labelled data and a loss"),
        (Data(train=[], loss=cross_entropy), "no batches"),
        (Data(train=[labelled((2, 4), 3)], loss=lambda o, b: o), "expected a scalar tensor"),
        (Data(train=[labelled((2, 4), 3)], loss=lambda o, b: 3.0), "expected a scalar tensor"),
    ],
)
def test_data_that_cannot_give_gradients_are_refused(data: Data, message: str) -> None:
    for needs in (["gradient"], ["hessian_diagonal"]):
        with pytest.raises(DataError, match=message):
            collect_gradients(nn.Sequential(nn.Linear(4, 3)), ["0.weight"], needs, data)


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown gradient statistics: gram"):
        collect_gradients(nn.Linear(2, 2), ["weight"], ["gram"], Data())
