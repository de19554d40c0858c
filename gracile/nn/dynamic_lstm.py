"""An LSTM that rounds its inputs and states to 8 bits as they come, as the kernel with integer products does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gracile.nn.sequences import directions, padded, reverse

#: The largest code of inputs and states, which are unsigned.
QMAX = 255


def on_dynamic_grid(x: Tensor) -> Tensor:
    """s · (clip(round(x / s) + z, 0, 255) − z), s = (max(x, 0) − min(x, 0)) / 255, z = round(−min(x, 0) / s).

    One scale for the whole tensor, as ONNX's DynamicQuantizeLinear defines it; rounding half to even. x: any shape and
    float dtype, computed in float32. Zeros stay zeros. The gradient passes straight through.
    """
    if not x.numel():
        return x
    with torch.no_grad():
        y = x.float()
        low, high = y.amin().clamp(max=0), y.amax().clamp(min=0)
        scale = torch.where(high > low, (high - low) / QMAX, 1.0)
        zero = (-low / scale).round_().clamp_(0, QMAX)
        rounded = torch.div(y, scale).round_().add_(zero).clamp_(0, QMAX).sub_(zero).mul_(scale).to(x.dtype)
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def run_dynamic_lstm(layer: nn.LSTM, input: Tensor | PackedSequence, hx: Sequence[Tensor] | None) -> tuple[Any, Any]:
    """What `nn.LSTM` gives, the products' inputs on a grid: those of all steps on one, and the states of each step.

        gates_t = grid(x)_t W_ihᵀ + b_ih + grid(h_{t−1}) W_hhᵀ + b_hh

    Scales are for the whole batch, so that an example's outputs depend a little on the others. layer: without
    projections. input, hx: padded, packed or single sequences, with states or without, as `nn.LSTM` takes them.
    """
    x, lengths = padded(layer, input)
    depths = layer.num_layers * (1 + layer.bidirectional)
    single = isinstance(input, Tensor) and input.ndim == 2
    shape = (depths, x.shape[1], layer.hidden_size)
    if hx is None:
        start = [x.new_zeros(shape)] * 2
    else:
        start = [state.unsqueeze(1) if single else state for state in hx]
        for state in start:
            layer.check_hidden_size(state, shape)
    ends: list[tuple[Tensor, Tensor]] = []
    for depth in range(layer.num_layers):
        outputs = []
        for end in directions(layer):
            sequence = reverse(x, lengths) if end else x
            begun = (start[0][len(ends)], start[1][len(ends)])
            output, last = run_depth(layer, f"l{depth}{end}", sequence, begun, lengths)
            outputs.append(reverse(output, lengths) if end else output)
            ends.append(last)
        x = torch.cat(outputs, -1)
        if layer.dropout and layer.training and depth < layer.num_layers - 1:
            x = F.dropout(x, layer.dropout)
    states = tuple(torch.stack(each) for each in zip(*ends))
    if isinstance(input, PackedSequence):
        return _packed(x, lengths, input), states
    if single:
        return x.squeeze(1), tuple(state.squeeze(1) for state in states)
    return x.transpose(0, 1) if layer.batch_first else x, states


def run_depth(
    layer: nn.LSTM, suffix: str, x: Tensor, state: tuple[Tensor, Tensor], lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Outputs [steps, batch, hidden] of one depth and direction, and its last states [batch, hidden].

    x: [steps, batch, ·], in the direction's order. state: [batch, hidden] each. lengths: [batch], None where all are
    as long.
    """
    inner, recurrent = (getattr(layer, f"weight_{part}_{suffix}").to(x.dtype) for part in ("ih", "hh"))
    bias = sum(getattr(layer, f"bias_{part}_{suffix}") for part in ("ih", "hh")) if layer.bias else None
    given = F.linear(on_dynamic_grid(x), inner, bias)
    (h, c), outputs = state, []
    for step, gates in enumerate(given):
        i, f, g, o = (gates + F.linear(on_dynamic_grid(h), recurrent)).chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        if lengths is None:
            h, c = new_h, new_c
        else:
            runs = (step < lengths)[:, None]
            h, c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def _packed(y: Tensor, lengths: Tensor | None, like: PackedSequence) -> PackedSequence:
    """Padded outputs, packed in the order of the packed inputs."""
    assert lengths is not None
    if like.sorted_indices is not None:
        y, lengths = y.index_select(1, like.sorted_indices), lengths.index_select(0, like.sorted_indices)
    data = pack_padded_sequence(y, lengths.cpu()).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
