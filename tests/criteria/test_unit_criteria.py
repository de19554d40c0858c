"""Criteria of whole units: values by hand and by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.criteria import FPGM, Activation, BatchNormScale, CannotScoreError, GateFisher, Units
from gracile.errors import ConfigError


def test_batch_norm_scales_are_summed_over_norms_and_positions() -> None:
    units = Units(norm_scales=(torch.tensor([[0.5], [-2.0]]), torch.tensor([[0.0], [-0.25]])))
    assert BatchNormScale().unit_scores(units).tolist() == [0.5, 2.25]
    flattened = Units(norm_scales=(torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, -3.0]]),))
    assert BatchNormScale().unit_scores(flattened).tolist() == [2.5, 3.0]


def test_activations_are_means_over_a_unit_s_inputs_and_then_over_the_layers_that_read_it() -> None:
    units = Units(inputs=(torch.tensor([[1.0, 3.0], [4.0, 4.0]]), torch.tensor([[8.0], [0.0]])))
    assert Activation().unit_scores(units).tolist() == [5.0, 2.0]
    np.testing.assert_allclose(Activation(power=2).unit_scores(units), np.sqrt([5.0, 2.0]), rtol=1e-12)


def test_fpgm_is_the_sum_of_distances_to_all_other_filters() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(7, n, generator=generator) for n in (5, 12)]
    expected = np.zeros(7)
    for filters in layers:
        rows = filters.double().numpy()
        expected += [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
    np.testing.assert_allclose(FPGM().unit_scores(Units(makers=tuple(layers))), expected, rtol=1e-12)


def test_fpgm_takes_the_filter_in_the_middle_and_not_the_smallest() -> None:
    filters = torch.tensor([[0.1, 0.0], [5.0, 0.0], [6.0, 0.0], [5.5, 0.0], [9.0, 0.0]])
    assert int(FPGM().unit_scores(Units(makers=(filters,))).argmin()) == 3


def test_equal_filters_far_from_zero_have_no_distance() -> None:
    filters = torch.full((3, 4), 1e4)
    assert FPGM().unit_scores(Units(makers=(filters,))).tolist() == [0, 0, 0]


def test_gate_fisher_is_half_the_mean_square() -> None:
    assert GateFisher().unit_scores(Units(gate_gradient_sq=torch.tensor([4.0, 0.0]))).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (BatchNormScale(), "no batch norm with a scale"),
        (Activation(), "not all that reads it"),
        (FPGM(), "no weight matrix"),
    ],
)
def test_units_without_what_it_reads_cannot_be_scored(criterion: FPGM, said: str) -> None:
    with pytest.raises(CannotScoreError, match=said):
        criterion.unit_scores(Units())


def test_gradients_that_nobody_collected_are_named() -> None:
    with pytest.raises(ConfigError, match="'gate_gradient_sq' was not collected"):
        GateFisher().unit_scores(Units())


@pytest.mark.parametrize("power", [0, 3, -1, 1.5, float("nan")])
def test_other_powers_of_activations_are_refused(power: float) -> None:
    with pytest.raises(ConfigError, match="1 for absolute values"):
        Activation(power=power)  # type: ignore[arg-type]
