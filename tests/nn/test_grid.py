"""Training on a grid: what is trained is exactly what is stored."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gracile.formats import (
    NF4,
    Codebook,
    FixedPoint,
    Format,
    Int,
    Levels,
    MidRise,
    PerGroup,
    PerTensor,
    format_to_config,
)
from gracile.nn import QuantizedConv, begin_training, end_training, freeze_batch_norms, keep_sizes, quantize_layer
from gracile.nn.grid import input_on_grid, learned_levels, learned_scale, weight_on_grid

FORMATS = [
    Int(8),
    Int(4),
    Int(4, PerGroup(4)),
    Int(2, PerTensor()),
    Int(5, symmetric=False),
    Int(3, PerGroup(4), symmetric=False),
    FixedPoint(16),
    NF4(PerGroup(4)),
    Codebook(2),
    Codebook(4),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def net(fmt: Format) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    for index in (0, 2):
        tensors = {f"weight_{name}": t for name, t in fmt.encode(model[index].weight).items()}
        model[index] = quantize_layer(model[index], tensors, {"weight": format_to_config(fmt)})
    return model


@each_format
def test_beginning_and_ending_changes_nothing(fmt: Format) -> None:
    model = net(fmt)
    before = copy.deepcopy(model.state_dict())
    begin_training(model)
    end_training(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_format
def test_what_was_trained_is_exactly_what_is_stored(fmt: Format) -> None:
    model, x = net(fmt), torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    original = model(x).detach()
    grids = [
        (model[i], name, getattr(model[i], name).clone())
        for i, name in itertools.product((0, 2), ("weight_scale", "weight_levels"))
        if hasattr(model[i], name)
    ]
    assert len(grids) == (0 if isinstance(fmt, FixedPoint) else 2)
    begin_training(model)
    assert torch.equal(model(x), original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained, weight = model(x).detach(), model[0].decoded_weight().detach().clone()
    assert not torch.equal(trained, original)
    end_training(model)
    assert torch.equal(model(x), trained)
    assert torch.equal(model[0].decoded_weight(), weight)
    for layer, name, before in grids:
        assert not torch.equal(before, getattr(layer, name))
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "2.bias"]


@pytest.mark.parametrize("fmt", [Int(2), Int(3, PerGroup(4), symmetric=False), Int(4, PerTensor())], ids=str)
def test_a_weight_starts_where_its_cell_is_nearest_to_the_original(fmt: Int) -> None:
    generator = torch.Generator().manual_seed(4)
    layer, x = nn.Linear(8, 6), torch.randn(5, 8, generator=generator)
    original = torch.randn(6, 8, generator=generator)
    layer.weight.data = 3 * original  # folded since
    tensors = {f"weight_{name}": t for name, t in fmt.encode(layer.weight * 0.9).items()}
    new = quantize_layer(layer, tensors, {"weight": format_to_config(fmt)})
    before, decoded = new(x).detach(), new.decoded_weight().clone()
    new.begin_training(original)
    assert torch.equal(new(x), before)  # no code has changed
    held = new.weight.detach()
    assert float((held - decoded).abs().mean()) > 0
    within = (held - decoded).abs() < 0.48 * new.weight_scale.repeat_interleave(
        held.numel() // new.weight_scale.numel()
    ).view(6, 8)
    for values, priors, free in zip(held, original, within):
        ratio = (values / priors)[free]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    new.end_training()
    assert torch.equal(new.decoded_weight(), decoded)


def test_a_weight_whose_code_a_solver_chose_starts_at_its_code() -> None:
    layer, fmt = nn.Linear(4, 2, bias=False), Int(3)
    original = torch.tensor([[2.2, -1.3, 0.6, 3.4], [5.0, 3.4, 3.4, -5.0]])
    codes = torch.tensor([[2.0, -2.0, 1.0, 3.0], [3.0, 3.0, 3.0, -4.0]])  # -1.3 would have gone to -1
    encoded = fmt.encode(codes, scale=torch.ones(2))
    new = quantize_layer(layer, {f"weight_{name}": t for name, t in encoded.items()}, {"weight": format_to_config(fmt)})
    new.begin_training(original)
    assert new.weight[0, 1] == -2.0
    assert float(new.weight[1, 0].detach()) == pytest.approx(3.49)  # there is no cell on that side
    new.end_training()
    assert torch.equal(new.decoded_weight(), codes)


def test_pruned_weights_start_at_zero_and_the_others_near_the_original() -> None:
    layer, fmt = nn.Linear(8, 4, bias=False), Int(4)
    original = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    pruned = original * (original.abs() > 0.6)
    tensors = {f"weight_{name}": t for name, t in fmt.encode(pruned).items()}
    new = quantize_layer(layer, tensors, {"weight": format_to_config(fmt), "sparse": True})
    new.begin_training(original)
    held = new.weight.detach()
    assert torch.equal(held[pruned == 0], torch.zeros(int((pruned == 0).sum())))
    kept = pruned != 0
    torch.testing.assert_close(held[kept], original[kept], rtol=0.5 / 7, atol=0.0)  # the largest code tells the factor


def test_an_original_of_another_shape_tells_nothing() -> None:
    model = net(Int(4))
    before = copy.deepcopy(model.state_dict())
    begin_training(model, nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 4)))
    assert torch.equal(model[0].weight, model[0].decoded_weight())
    end_training(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_weights_pass_inside_the_grid_and_outside_if_they_lead_back() -> None:
    weight = torch.tensor([[-9.0, -7.6, 0.2, 6.9, 7.4, 8.1]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    found = weight_on_grid(weight, Int(4, PerTensor()), {"scale": scale})
    assert found.tolist() == [[-8.0, -8.0, 0.0, 7.0, 7.0, 7.0]]
    (found * torch.arange(1.0, 7.0)).sum().backward()
    assert weight.grad is not None and scale.grad is not None
    assert weight.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0, 6.0]]  # descent would move -9 on, and 8.1 back
    # Outside the bound itself; inside round(v) - v, each times its gradient: LSQ, equation 3.
    expected = 1 * -8 + 2 * (-8 + 7.6) + 3 * (0 - 0.2) + 4 * (7 - 6.9) + 5 * (7 - 7.4) + 6 * 7
    assert float(scale.grad) == pytest.approx(expected, rel=1e-5)


def test_a_mid_rise_grid_reaches_to_the_edge_of_its_outermost_cells() -> None:
    weight = torch.tensor([[-4.1, -3.9, -0.1, 0.5, 3.9, 4.1]], requires_grad=True)
    found = weight_on_grid(weight, MidRise(2, PerTensor()), {"scale": torch.tensor(1.0)})
    assert found.tolist() == [[-3.0, -3.0, -1.0, 1.0, 3.0, 3.0]]
    (found * torch.tensor([1.0, 1, 1, 1, -1, -1])).sum().backward()  # descent would move the outer ones on
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, -1.0, 0.0]]


@pytest.mark.parametrize(
    "fmt", [Int(3), Int(3, PerGroup(3), symmetric=False), Int(2, PerTensor()), NF4(PerGroup(3)), MidRise(2)]
)
def test_gradients_of_scales_are_the_slope_of_the_rounded_weight(fmt: Int | Levels) -> None:
    """Codes held, the decoded weight is scale times a constant: its slope in the scale, less that of the weight."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    encoded = fmt.encode(weight)
    scale = (encoded["scale"] * 0.4).requires_grad_()  # some weights lie outside
    variable = weight.clone().requires_grad_()
    # Descent moves every weight away from zero, so that what passes is what lies inside.
    upstream = -weight.sign() * torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    (weight_on_grid(variable, fmt, encoded | {"scale": scale}) * upstream).sum().backward()
    assert variable.grad is not None and scale.grad is not None
    inside = variable.grad != 0
    assert 0 < int(inside.sum()) < 24
    with torch.no_grad():
        grid = {k: v for k, v in encoded.items() if k == "zero_point"} | {"scale": scale.detach()}
        per_scale = (fmt.decode(fmt.encode(weight, **grid)) - weight * inside) * upstream
    groups = {PerGroup: (4, 2), PerTensor: (1, 1)}.get(type(fmt.granularity), (4, 1))
    sums = np.array(
        [block.sum() for row in np.split(per_scale.numpy(), groups[0]) for block in np.split(row, groups[1], 1)]
    )
    np.testing.assert_allclose(scale.grad.numpy().ravel(), sums / scale.detach().numpy().ravel(), rtol=1e-4, atol=1e-5)


def test_levels_have_the_sum_of_their_weights_gradients_and_weights_their_own() -> None:
    levels = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    weight = torch.tensor([[-3.0, -0.6, 0.4], [1.1, 5.0, -0.4]], requires_grad=True)
    y = weight_on_grid(weight, Codebook(2), {"levels": levels})
    assert y.tolist() == [[-1.0, -1.0, 0.0], [2.0, 2.0, 0.0]]
    upstream = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    (y * upstream).sum().backward()
    assert weight.grad is not None and levels.grad is not None
    assert torch.equal(weight.grad, upstream)
    assert levels.grad.tolist() == [3.0, 36.0, 24.0]


def test_learned_levels_move_by_shares_of_the_largest_and_zero_stays() -> None:
    levels, change = torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(3, requires_grad=True)
    learned = learned_levels(levels, change, 12)
    assert torch.equal(learned, levels)
    (learned * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert change.grad is not None
    assert change.grad.tolist() == [1 * 2 / 2, 0.0, 3 * 2 / 2]  # √(12 values / 3 levels) is 2
    assert learned_levels(levels, torch.tensor([0.75, 9.0, -0.75]), 12).tolist() == [0.0, 0.5, 0.5]


def test_gradients_of_inputs_and_their_scale() -> None:
    x = torch.tensor([[-0.3, 0.1, 0.9, 1.45, 1.6]], requires_grad=True)  # codes 0 to 3, zero point 0, steps of 0.5
    scale = torch.tensor(0.5, requires_grad=True)
    y = input_on_grid(x, scale, torch.tensor(0), 0, 3)
    assert y.tolist() == [[0.0, 0.0, 1.0, 1.5, 1.5]]
    (y * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0]]  # 1.6 is still within the last half step
    expected = 2 * (0 - 0.2) + 3 * (2 - 1.8) + 4 * (3 - 2.9) + 5 * (3 - 3.2)
    assert float(scale.grad) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_an_input_scale_is_estimated_without_bias() -> None:
    """A quarter of the examples stands for all of them: of eight equal examples exactly."""
    x = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)).expand(8, 50).contiguous()
    scale = torch.tensor(0.4, requires_grad=True)
    input_on_grid(x, scale, torch.tensor(2), 0, 7).square().sum().backward()
    eight, scale.grad = scale.grad, None
    input_on_grid(x[:1], scale, torch.tensor(2), 0, 7).square().sum().backward()
    assert eight is not None and scale.grad is not None
    assert float(eight) == pytest.approx(8 * float(scale.grad), rel=1e-5)


def test_learned_scales_move_by_shares_of_themselves() -> None:
    scale, change = torch.tensor([1e-6, 5.0]), torch.zeros(2, requires_grad=True)
    learned = learned_scale(scale, change, 16)
    assert torch.equal(learned, scale)
    (learned * torch.tensor([2.0, 3.0])).sum().backward()
    assert change.grad is not None
    assert change.grad.tolist() == pytest.approx([2 * 1e-6 / 4, 3 * 5 / 4])
    assert bool((learned_scale(scale, torch.tensor([-3.0, -3.0]), 16) > 0).all())


def conv() -> QuantizedConv:
    generator = torch.Generator().manual_seed(7)
    old = nn.Conv2d(3, 5, 3, padding=1)
    for parameter in old.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    fmt = Int(3)
    tensors = {f"weight_{name}": t for name, t in fmt.encode(old.weight).items()}
    layer = quantize_layer(old, tensors, {"weight": format_to_config(fmt), "bias": True, "batch_norm": 1e-5})
    assert isinstance(layer, QuantizedConv)
    return layer


def test_a_folded_batch_norm_stands_behind_its_convolution_while_it_trains() -> None:
    layer, x = conv().eval(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(8))
    before, state = layer(x).detach(), copy.deepcopy(layer.state_dict())
    begin_training(layer)
    assert isinstance(layer.batch_norm, nn.BatchNorm2d)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    end_training(layer)
    assert layer.batch_norm is None
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    begin_training(layer.train())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    trained = layer.eval()(x).detach()
    signs = layer.weight_scale.sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    end_training(layer)
    # Its statistics went into scales and biases: the same but for rounding in float32.
    torch.testing.assert_close(layer(x), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, before, atol=0.1)
    assert torch.equal(layer.weight_scale.sign(), signs)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    layer, x = conv().train(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(8))
    begin_training(layer)
    layer(x)
    moved = layer.batch_norm.running_mean.clone()  # type: ignore[union-attr,operator]
    assert bool(moved.any())
    freeze_batch_norms(layer)
    layer(x + 5)
    assert torch.equal(layer.batch_norm.running_mean, moved)  # type: ignore[union-attr,arg-type]


def test_with_its_statistics_kept_a_batch_norm_is_part_of_the_weight() -> None:
    """The same outputs and gradients as the norm's own, which eval mode takes."""
    layer, x = conv().train(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(8))
    begin_training(layer)
    layer(3 * x + 1)
    freeze_batch_norms(layer)
    found = []
    for training in (True, False):
        layer.training = training
        layer.zero_grad()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + 2 + 2  # outputs; weight and scale, γ and β
    for folded, apart in zip(*found, strict=True):
        torch.testing.assert_close(folded, apart, rtol=1e-4, atol=1e-4)  # sums of 720 products in float32


def test_weights_behind_a_batch_norm_that_trains_keep_the_size_of_each_channel() -> None:
    layer = conv().train()
    begin_training(layer)
    weight = layer._parameters["weight"]
    assert weight is not None
    start = weight.detach().flatten(1).norm(dim=1)
    with torch.no_grad():
        weight.mul_(torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5]).view(-1, 1, 1, 1)).add_(0.1)
    grown = weight.detach().clone()
    keep_sizes(layer)
    torch.testing.assert_close(weight.detach().flatten(1).norm(dim=1), start)
    cosine = nn.functional.cosine_similarity(weight.detach().flatten(1), grown.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5))  # the direction stays
    freeze_batch_norms(layer)  # now the size says something
    with torch.no_grad():
        weight.copy_(grown)
    keep_sizes(layer)
    assert torch.equal(weight.detach(), grown)
    linear = net(Int(4))
    begin_training(linear)
    before = copy.deepcopy(linear.state_dict())
    keep_sizes(linear)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


@each_format
def test_zeros_stay_exactly_zero(fmt: Format) -> None:
    layer = nn.Linear(8, 6)
    layer.weight.data[:, ::2] = 0.0
    tensors = {f"weight_{name}": t for name, t in fmt.encode(layer.weight).items()}
    new = quantize_layer(layer, tensors, {"weight": format_to_config(fmt)})
    begin_training(new)
    assert not new.decoded_weight()[:, ::2].any()
    end_training(new)
    assert not new.decoded_weight()[:, ::2].any()


@pytest.mark.parametrize("fmt", [Int(4), Int(4, PerTensor()), NF4(PerGroup(4))], ids=str)
def test_the_rounded_kernel_is_laid_out_as_its_parameter(fmt: Format) -> None:
    """A convolution lays its output out as its kernel is: else the whole net computes in the slower layout."""
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    encoded = fmt.encode(weight)
    kernel = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    rounded = weight_on_grid(kernel, fmt, encoded)
    assert rounded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rounded, weight_on_grid(weight, fmt, encoded))
    rounded.sum().backward()
    assert kernel.grad is not None and kernel.grad.is_contiguous(memory_format=torch.channels_last)
