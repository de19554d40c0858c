from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gracile.context import Context
from gracile.data import Data
from gracile.errors import DataError
from gracile.formats import W2A2, W2A8, W8A8, Scheme
from gracile.stats.match import _Matcher, layers_of_few_bits, match_statistics
from gracile.steps import Quantize


def batches(count: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 1.5 + 0.5 for _ in range(count)]


def convolutional(seed: int = 0) -> nn.Sequential:
    """Batch-norm statistics that are those of no data, so that re-estimating them would change the outputs a lot."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.running_mean, std=2.0)
        nn.init.uniform_(norm.running_var, 0.3, 4.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return net.eval()


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def difference(a: nn.Module, b: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        error = sum(float((a(x) - b(x)).double().square().sum()) for x in data)
        return error / sum(float(b(x).double().square().sum()) for x in data)


def test_an_untouched_model_stays_bit_for_bit_whatever_its_stored_statistics() -> None:
    net = convolutional()
    twin, before = copy.deepcopy(net), state(net)
    data = batches(5, (8, 3, 8, 8))
    done = match_statistics(net, twin, Data(calibration=data), {})
    assert (done.error_before, done.error_after, done.accepted, done.layers) == (0.0, 0.0, False, ())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    # Not because it was taken back: what the matcher stores is the identity by itself.
    matcher = _Matcher(net, twin, ["0", "1", "4", "7"], {}, False)
    with torch.no_grad(), matcher:
        for x in data:
            twin(x), net(x)
    matcher.store()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-7, atol=0)  # a float64 average rounded to float32
    # Plain re-estimation is not: the stored statistics are far from those of these data.
    rows = twin[0](torch.cat(data)).movedim(1, -1).flatten(0, -2)
    assert bool(((rows.mean(0) - before["1.running_mean"]).abs() > 0.5).any())


def test_a_shift_of_a_convolution_bias_is_taken_out_again() -> None:
    original = convolutional()
    net = copy.deepcopy(original)
    with torch.no_grad():
        net[0].bias += torch.linspace(-1, 1, 6)
    done = match_statistics(net, original, Data(calibration=batches(9, (8, 3, 8, 8))), {})
    assert done.accepted and done.error_before > 1e-2
    torch.testing.assert_close(net[0].bias, original[0].bias, rtol=0, atol=1e-5)  # float32 means of 288 values
    assert difference(net, original, batches(2, (8, 3, 8, 8), seed=9)) < 1e-10


def test_a_scale_before_a_batch_norm_is_taken_out_by_its_statistics() -> None:
    """Weights times c give means and deviations times c, so the norm's own means and variances must follow."""
    original = convolutional()
    net = copy.deepcopy(original)
    factors = torch.tensor([0.5, 1.0, 2.0, 3.0])
    with torch.no_grad():
        net[3].weight.mul_(factors.view(4, 1, 1, 1))
    data = batches(9, (8, 3, 8, 8))
    done = match_statistics(net, original, Data(calibration=data), {})
    assert done.accepted and set(done.layers) == {"0", "1", "4", "7"}
    np.testing.assert_allclose(net[4].running_var, original[4].running_var * factors**2, rtol=1e-4)
    with torch.no_grad():
        fitted = [x for i, x in enumerate(data) if i % 8]
        means = torch.stack([original[:4](x).mean((0, 2, 3)) for x in fitted]).double().mean(0)
    expected = original[4].running_mean.double() + means * (factors - 1)
    np.testing.assert_allclose(net[4].running_mean, expected, atol=1e-4)


def test_biases_alone_are_left_when_asked_for() -> None:
    original = convolutional()
    net = copy.deepcopy(original)
    with torch.no_grad():
        net[0].bias += 1
    done = match_statistics(net, original, Data(calibration=batches(4, (8, 3, 8, 8))), {}, biases=False)
    assert done.accepted and set(done.layers) == {"1", "4"}
    torch.testing.assert_close(net[0].bias, original[0].bias + 1)
    torch.testing.assert_close(net[1].running_mean, original[1].running_mean + 1, rtol=0, atol=1e-5)


class Unlucky(nn.Module):
    """A bias that helps on average only on the fitted batches: the held-out one has the opposite sign."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.constant_(self.layer.bias, 1.0)
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.clamp(-1, 1) if self.shifted else x) + x.abs() * 0
        return y


def test_a_correction_that_harms_on_held_out_batches_is_taken_back_exactly() -> None:
    original, net = Unlucky(False), Unlucky(True)
    with torch.no_grad():
        original.layer.weight.fill_(1.0)
        net.layer.weight.fill_(1.0)
    held_out, fitted = torch.full((4, 1), -3.0), torch.full((4, 1), 3.0)
    before = state(net)
    done = match_statistics(net, original, Data(calibration=[held_out, fitted, fitted]), {})
    # On the fitted batches 3 became 1, so the bias would grow by 2; on the held-out one −3 became −1.
    assert not done.accepted and done.layers == ()
    assert done.error_before == pytest.approx(4 / 4)  # (0 + 2)² / (−3 + 1)²
    assert done.error_after == pytest.approx(16 / 4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_the_held_out_error_never_rises(seed: int) -> None:
    original = convolutional(seed)
    net = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator) * p.abs().mean()
    data = batches(9, (4, 3, 8, 8), seed)
    before = difference(net, original, data[::8])
    done = match_statistics(net, original, Data(calibration=data), {})
    after = difference(net, original, data[::8])
    assert done.error_before == pytest.approx(before, rel=1e-6)
    assert after <= before
    assert after == pytest.approx(done.error_after if done.accepted else done.error_before, rel=1e-6)


def test_a_cut_model_is_matched_at_the_channels_it_kept() -> None:
    """With what the removed channels contributed replaced by a constant, biases can restore it exactly."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        original[0].weight[[1, 4]] = 0  # constant units: their whole effect is a bias of the next layer
    kept = torch.tensor([0, 2, 3, 5])
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        net[0].weight.copy_(original[0].weight[kept])
        net[0].bias.copy_(original[0].bias[kept])
        net[1].weight.copy_(original[1].weight[:, kept])
        net[1].bias.copy_(original[1].bias)
    data = Data(calibration=batches(4, (16, 3)))
    done = match_statistics(net, original, data, {"0": kept})
    gone = torch.tensor([1, 4])
    expected = original[1].bias + original[1].weight[:, gone] @ original[0].bias[gone]
    assert done.accepted
    torch.testing.assert_close(net[1].bias, expected, rtol=0, atol=1e-6)
    assert done.error_after < 1e-12


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm, self.idle = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.shared(x)))
        out: Tensor = self.norm(self.shared(y))
        return out


def test_layers_called_twice_are_matched_call_by_call_and_idle_ones_are_not_named() -> None:
    torch.manual_seed(0)
    original = Twice().eval()
    nn.init.uniform_(original.norm.running_var, 0.5, 2.0)
    net = copy.deepcopy(original)
    shift = torch.tensor([1.0, -1.0, 0.5, 0.0])
    with torch.no_grad():
        net.shared.bias += shift
    done = match_statistics(net, original, Data(calibration=batches(5, (32, 4))), {})
    # Each call's output is moved by the same shift, so the average of both corrections is the shift.
    assert done.accepted and set(done.layers) == {"shared", "norm"}
    torch.testing.assert_close(net.shared.bias, original.shared.bias, rtol=0, atol=1e-5)
    torch.testing.assert_close(net.norm.running_mean, original.norm.running_mean, rtol=0, atol=1e-5)


def test_channels_constant_in_the_original_keep_their_stored_variance() -> None:
    original = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        original[0].weight[0] = 0
    net = copy.deepcopy(original)
    with torch.no_grad():
        net[0].weight[0] = torch.tensor([0.1, 0, 0])
    match_statistics(net, original, Data(calibration=batches(3, (16, 3))), {}, biases=False)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values() if value.is_floating_point())
    assert net[1].running_var[0] == original[1].running_var[0]


def test_modes_and_hooks_are_as_before_and_the_original_is_untouched_also_after_an_error() -> None:
    original, net = convolutional(), convolutional()
    with torch.no_grad():
        net[0].bias += 1
    net.train()
    net[1].eval()
    before = state(original)
    match_statistics(net, original, Data(calibration=batches(3, (4, 3, 8, 8))), {})
    with pytest.raises(DataError):
        match_statistics(net, original, Data(calibration=[*batches(2, (4, 3, 8, 8)), torch.ones(1, 2)]), {})
    assert [m.training for m in net] == [True, False] + [True] * 6
    assert not any(m.training for m in original.modules())
    for module in (*net.modules(), *original.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_one_batch_serves_both_ends_and_progress_is_told() -> None:
    original = convolutional()
    net = copy.deepcopy(original)
    with torch.no_grad():
        net[7].bias += 2
    seen: list[int] = []
    done = match_statistics(net, original, Data(calibration=batches(1, (8, 3, 8, 8))), {}, on_batch=seen.append)
    assert done.accepted and done.error_after < 1e-10 and seen == [1]


class LinearByName(nn.Module):
    """Named like a layer of PyTorch's, with a bias that is none of an output channel each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return (x @ self.weight.t()).transpose(0, 1) + self.bias, 1.0


class Pairs(nn.Linear):
    """A linear layer that returns more than its product."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:  # type: ignore[override]
        return super().forward(x), 1.0


@pytest.mark.parametrize("kind", [LinearByName, lambda: Pairs(4, 6)])
def test_modules_that_are_no_layers_of_one_output_are_left_alone(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    original = kind()
    net = copy.deepcopy(original)
    with torch.no_grad():
        net.bias += 1
    data = Data(calibration=[torch.randn(5, 4) for _ in range(3)])
    before = state(net)
    assert match_statistics(net, original, data, {}).layers == ()
    assert all(torch.equal(v, before[k]) for k, v in state(net).items())


def quantized(scheme: Scheme) -> tuple[nn.Module, nn.Sequential, list[Tensor]]:
    """A net in few bits, and what it is of with its batch norms folded: its first and last layer have 8 bits."""
    net, data = convolutional(), batches(3, (16, 3, 8, 8))
    net.append(nn.Linear(5, 5))
    context = Context(Data(calibration=data), net, net)
    folded, model = copy.deepcopy(net), copy.deepcopy(net)
    for conv, norm in ((0, 1), (3, 4)):
        folded[conv], folded[norm] = fuse_conv_bn_eval(folded[conv], folded[norm]), nn.Identity()  # type: ignore[arg-type,type-var]
    Quantize(scheme, correct=False)(model, context)
    return model, folded, data


def moments(net: nn.Module, name: str, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of a layer's output."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        for x in data:
            net(x)
    handle.remove()
    rows = torch.cat(seen).movedim(1, -1).flatten(0, -2).double()
    return rows.mean(0), rows.std(0, correction=0)


@pytest.mark.parametrize("scheme", [W2A8, W2A2], ids=str)
def test_channels_of_few_bits_get_the_mean_and_the_scale_of_the_original(scheme: Scheme) -> None:
    model, folded, data = quantized(scheme)
    assert layers_of_few_bits(model, folded) == ["3", "7"]
    before = moments(model, "3", data[:1])
    done = match_statistics(model, folded, Data(calibration=data[:1]), {}, gains=True)
    assert done.accepted and done.layers == ("3", "7") and done.error_after < done.error_before
    for found, wanted, was in zip(moments(model, "3", data[:1]), moments(folded, "3", data[:1]), before):
        # Inputs are on the same grid, so that of one batch they are met exactly but for the 8-bit grid of the output.
        np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02)
        assert float((was - wanted).abs().max()) > 3 * float((found - wanted).abs().max())


def test_channel_scales_are_put_back_where_the_error_does_not_fall() -> None:
    model, folded, data = quantized(W2A2)
    before = state(model)
    # Inputs fifty times as large are clipped, which scales cannot make good for inputs as they are.
    done = match_statistics(model, folded, Data(calibration=[data[0], *(50 * x for x in data)]), {}, gains=True)
    assert not done.accepted and done.error_after > done.error_before and done.layers == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_eight_bits_have_no_scales_to_match() -> None:
    model, folded, _ = quantized(W8A8)
    assert layers_of_few_bits(model, folded) == []
