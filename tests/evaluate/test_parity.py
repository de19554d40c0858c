"""Parity of outputs, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gracile.errors import DataError
from gracile.evaluate.parity import measure_parity
from gracile.targets.base import Outputs


def test_errors_and_agreement_by_hand() -> None:
    reference = torch.tensor([[1.0, 2.0], [4.0, 3.0], [-8.0, 0.0], [0.0, 1.0]])
    outputs = torch.tensor([[1.5, 2.0], [4.0, 5.0], [-8.0, 0.0], [0.0, 1.0]])
    found = measure_parity(reference, outputs)
    assert found.max_error == 2.0
    assert found.mean_error == pytest.approx(2.5 / 8)
    assert found.scale == 8.0
    assert found.relative_error == 0.25
    assert found.agreement == 0.75  # the second row changed its class


def test_several_outputs_are_compared_in_order_and_are_no_classes() -> None:
    reference = {"hidden": torch.ones(2, 3), "pooled": torch.zeros(2)}
    outputs = Outputs(hidden=torch.ones(2, 3), pooled=torch.tensor([0.0, -0.25]))
    found = measure_parity(reference, outputs)
    assert found.max_error == 0.25
    assert found.mean_error == pytest.approx(0.25 / 8)
    assert found.agreement is None


def test_logits_among_several_outputs_are_classes() -> None:
    reference = {"logits": torch.tensor([[0.0, 1.0]]), "hidden": torch.zeros(1, 4)}
    outputs = {"logits": torch.tensor([[1.0, 0.0]]), "hidden": torch.zeros(1, 4)}
    assert measure_parity(reference, outputs).agreement == 0.0


def test_a_column_of_numbers_has_no_classes() -> None:
    assert measure_parity(torch.ones(4, 1), torch.ones(4, 1)).agreement is None
    assert measure_parity(torch.ones(4), torch.ones(4)).agreement is None


def test_equal_outputs_agree_wholly_and_zeros_have_no_relative_error() -> None:
    found = measure_parity(torch.zeros(2, 2), torch.zeros(2, 2))
    assert (found.max_error, found.relative_error, found.agreement) == (0.0, 0.0, 1.0)


def test_what_is_infinite_in_both_is_no_error() -> None:
    masked = torch.tensor([[-math.inf, 1.0, 2.0]])
    found = measure_parity(masked, masked + torch.tensor([0.0, 0.0, 0.5]))
    assert found.max_error == 0.5
    assert found.scale == 2.0


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="1 output tensors, the other 2"):
        measure_parity(torch.ones(2), (torch.ones(2), torch.ones(2)))
    with pytest.raises(DataError, match=r"shape \(3,\), the reference \(2,\)"):
        measure_parity(torch.ones(2), torch.ones(3))
    with pytest.raises(DataError, match="not finite"):
        measure_parity(torch.ones(2), torch.tensor([1.0, math.nan]))
