"""SmoothQuant and AWQ: the formulas by NumPy, the function kept, and the choice of α."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gracile.equalize import AWQ, SmoothQuant
from gracile.errors import ConfigError


def grid(x: Tensor, axis: int | None) -> Tensor:
    """8-bit symmetric rounding, per tensor or per row."""
    peak = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    step = peak / 127
    return torch.round(x / step).clamp(-127, 127) * step


def rounded(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    return grid(weight, 1), grid(inputs, None)


def layer(outliers: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [12, 16] and inputs [400, 16], two channels of which are larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(12, 16, generator=generator), torch.randn(400, 16, generator=generator)
    inputs[:, [3, 11]] *= outliers
    return weight, inputs


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_scales_are_those_of_the_paper_with_a_geometric_mean_of_one(alpha: float) -> None:
    weight, inputs = layer(30)
    found = SmoothQuant().scales(inputs.abs().amax(0), weight, alpha).double().numpy()
    x, w = np.abs(inputs.double().numpy()).max(0), np.abs(weight.double().numpy()).max(0)
    expected = x**alpha / w ** (1 - alpha)
    expected /= np.exp(np.log(expected).mean())
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # rounded once to float32


def test_the_function_is_kept() -> None:
    weight, inputs = (t.double() for t in layer(30))
    scale = SmoothQuant().scales(inputs.abs().amax(0), weight, 0.5).double()
    assert float(scale.max() / scale.min()) > 3
    torch.testing.assert_close((inputs / scale) @ (weight * scale).T, inputs @ weight.T, rtol=1e-12, atol=1e-12)


def test_channels_that_are_never_used_keep_a_scale_of_one() -> None:
    weight, inputs = layer(30)
    weight[:, 2], inputs[:, 5] = 0, 0
    scale = SmoothQuant().scales(inputs.abs().amax(0), weight, 0.5)
    assert torch.isfinite(scale).all() and float(scale[2]) == float(scale[5]) == 1


def test_outliers_are_smoothed_and_the_error_falls() -> None:
    weight, inputs = layer(50)
    scale = SmoothQuant()(weight, inputs.abs().amax(0), inputs, rounded)
    assert scale is not None
    exact = inputs @ weight.T
    w, x = rounded(weight * scale, inputs / scale)
    smoothed = (x @ w.T - exact).square().sum()
    w, x = rounded(weight, inputs)
    assert smoothed < 0.3 * (x @ w.T - exact).square().sum()


def test_of_the_alphas_the_one_of_least_error_is_taken() -> None:
    weight, inputs = layer(50)
    peak, errors = inputs.abs().amax(0), {}
    for alpha in SmoothQuant().alphas:
        scale = SmoothQuant().scales(peak, weight, alpha)
        w, x = rounded(weight * scale, inputs[::2] / scale)
        errors[alpha] = float((x @ w.T - inputs[::2] @ weight.T).square().sum())
    best = min(errors, key=errors.__getitem__)
    found = SmoothQuant()(weight, peak, inputs, rounded)
    assert found is not None
    assert torch.equal(found, SmoothQuant().scales(peak, weight, best))


def test_inputs_without_outliers_are_left_alone() -> None:
    weight, inputs = layer(1)
    assert SmoothQuant()(weight, inputs.abs().amax(0), inputs, rounded) is None


def test_a_gain_below_the_minimum_is_not_worth_a_multiplication() -> None:
    weight, inputs = layer(50)
    peak = inputs.abs().amax(0)
    assert SmoothQuant(minimum_gain=1.5)(weight, peak, inputs, rounded) is not None
    assert SmoothQuant(minimum_gain=1e6)(weight, peak, inputs, rounded) is None


@pytest.mark.parametrize(
    "settings", [{"alphas": ()}, {"alphas": (1.5,)}, {"alphas": (-0.1, 0.5)}, {"minimum_gain": 0.5}], ids=str
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SmoothQuant(**settings)


def four_bits(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    step = weight.abs().amax(1, keepdim=True) / 7
    return torch.round(weight / step).clamp(-7, 7) * step, inputs


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_awq_scales_weights_by_the_mean_size_of_what_they_read(alpha: float) -> None:
    weight, inputs = layer(30)
    (found,) = AWQ(alphas=(alpha,)).candidates(weight, inputs.abs().amax(0), inputs)
    expected = np.abs(inputs.double().numpy()).mean(0) ** alpha
    expected /= np.exp(np.log(expected).mean())
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6)  # rounded once to float32


def test_awq_lowers_the_error_of_rounded_weights_and_keeps_the_function() -> None:
    weight, inputs = layer(30)
    scale = AWQ()(weight, inputs.abs().amax(0), inputs, four_bits)
    assert scale is not None and float(scale[3]) > 1 and float(scale[11]) > 1
    exact = inputs.double() @ weight.double().T
    again = (inputs.double() / scale.double()) @ (weight.double() * scale.double()).T
    torch.testing.assert_close(again, exact, rtol=1e-12, atol=1e-12)
    errors = [
        float((inputs / s @ four_bits(weight * s, inputs)[0].T - exact).square().sum())
        for s in (scale, torch.ones_like(scale))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_awq_leaves_inputs_that_are_all_alike() -> None:
    weight, inputs = layer(1)
    inputs[:, 7] = 0
    assert AWQ(minimum_gain=1.1)(weight, inputs.abs().amax(0), inputs, four_bits) is None
    assert float(AWQ().candidates(weight, inputs.abs().amax(0), inputs)[3][7]) == 1


@pytest.mark.parametrize("settings", [{"alphas": ()}, {"alphas": (2.0,)}, {"minimum_gain": 0.9}], ids=str)
def test_impossible_settings_of_awq_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"AWQ\({next(iter(settings))}"):
        AWQ(**settings)  # type: ignore[arg-type]
