"""Sequences as recurrent layers take them, one step after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


def directions(layer: nn.RNNBase) -> tuple[str, ...]:
    """What the names of a depth's weights end in, for each direction."""
    return ("", "_reverse") if layer.bidirectional else ("",)


def padded(layer: nn.RNNBase, input: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None]:
    """Sequences [steps, batch, inputs], and their lengths [batch] where they were packed; None: all are as long."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
        return x, lengths.to(x.device)
    return input.unsqueeze(1) if input.ndim == 2 else input.transpose(0, 1) if layer.batch_first else input, None


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence [steps, batch, ·] from its last step to its first, its padding left where it is."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device)[:, None]
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, order[..., None].expand_as(x))
