"""Sequences step by step: padding stays where it is, whatever way the sequences came."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from gracile.nn.sequences import padded, reverse


def test_padding_is_not_reversed() -> None:
    x = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 0.0]])[..., None]  # [steps, batch, 1]; the second has two steps
    assert reverse(x, torch.tensor([3, 2]))[..., 0].tolist() == [[3, 6], [2, 5], [1, 0]]
    assert reverse(x, None)[..., 0].tolist() == [[3, 0], [2, 6], [1, 5]]


@pytest.mark.parametrize("batch_first", [True, False])
def test_steps_come_first(batch_first: bool) -> None:
    layer, x = nn.GRU(4, 5, batch_first=batch_first), torch.randn(3, 2, 4)
    steps, lengths = padded(layer, x)
    assert torch.equal(steps, x.transpose(0, 1) if batch_first else x) and lengths is None
    single, lengths = padded(layer, x[:, 0])
    assert torch.equal(single[:, 0], x[:, 0]) and lengths is None
    both, lengths = padded(layer, pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False))
    assert lengths is not None and lengths.tolist() == [2, 3]
    assert torch.equal(both[:2, 0], x[:2, 0]) and torch.equal(both[:, 1], x[:, 1]) and not both[2, 0].any()
