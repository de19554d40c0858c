"""What the matrices of a recurrent layer read, step by step: inputs, and states along the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.nn.dynamic_lstm import on_dynamic_grid, run_depth
from gracile.nn.sequences import directions, padded, reverse

_SINGLE: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}


@dataclass(frozen=True)
class Steps:
    """Rows that one depth and direction reads at all steps of all sequences, each in the same order.

    inputs: x_t, [n, inputs]. states: h_{t−1}, [n, hidden], in LSTMs with projections [n, projected]. Of dynamic LSTMs
    as their grids leave them.
    """

    inputs: Tensor
    states: Tensor


def suffixes(layer: nn.RNNBase) -> list[str]:
    """Endings of the names of a layer's weights, in the order in which they are read: l0, l0_reverse, l1, ..."""
    return [f"l{depth}{end}" for depth in range(layer.num_layers) for end in directions(layer)]


@torch.no_grad()
def unroll(layer: nn.RNNBase, args: Sequence[Any], kwargs: Mapping[str, Any], suffix: str) -> Steps:
    """What `weight_ih_` and `weight_hh_` of this suffix read in one call of the layer, which is in eval mode.

    args, kwargs: of the call, as nn.LSTM, nn.GRU and nn.RNN take them: padded, packed or single sequences, with states
    or without. Padding is left out; the order of rows depends on lengths alone, so that two layers of one shape give
    rows that belong together.
    """
    x, lengths, first = _call(layer, *args, **kwargs)
    for depth in range(layer.num_layers):
        outputs = []
        for direction, end in enumerate(directions(layer)):
            own = f"l{depth}{end}"
            place = depth * (1 + layer.bidirectional) + direction
            sequence = reverse(x, lengths) if end else x
            start = None if first is None else tuple(state[place : place + 1] for state in first)
            output, begun = _run(layer, own, sequence, start)
            if own == suffix:
                before = torch.cat([begun, output[:-1]])
                if getattr(layer, "dynamic", False):
                    sequence, before = on_dynamic_grid(sequence), torch.stack([on_dynamic_grid(h) for h in before])
                if lengths is None:
                    return Steps(sequence.flatten(0, 1), before.flatten(0, 1))
                valid = torch.arange(len(sequence), device=x.device)[:, None] < lengths
                return Steps(sequence[valid], before[valid])
            outputs.append(reverse(output, lengths) if end else output)
        x = torch.cat(outputs, -1)
    raise ValueError(f"The layer has no weights of suffix '{suffix}', only {', '.join(suffixes(layer))}.")


def _call(layer: nn.RNNBase, input: Any, hx: Any = None) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Sequences and their lengths (`padded`), and the states they start with, [depths, batch, ·]."""
    x, lengths = padded(layer, input)
    states = None if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if states is not None and states[0].ndim == 2:
        states = tuple(state.unsqueeze(1) for state in states)
    return x, lengths, states


def _run(layer: nn.RNNBase, suffix: str, x: Tensor, start: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
    """Outputs [steps, batch, ·] of one depth and direction, and its state [1, batch, ·] before the first step."""
    if getattr(layer, "dynamic", False):
        assert isinstance(layer, nn.LSTM)
        zeros = x.new_zeros(x.shape[1], layer.hidden_size)
        first = (zeros, zeros) if start is None else (start[0][0], start[1][0])
        return run_depth(layer, suffix, x, first, None)[0], first[0][None]
    settings: dict[str, Any] = {"bias": layer.bias, "proj_size": layer.proj_size}
    if layer.mode.startswith("RNN"):
        kind, settings = nn.RNN, {"bias": layer.bias, "nonlinearity": layer.mode.split("_")[1].lower()}
    else:
        kind = _SINGLE[layer.mode]
        if not layer.proj_size:
            settings.pop("proj_size")
    with torch.device("meta"):
        single = kind(x.shape[-1], layer.hidden_size, **settings)
    names = [name for name, _ in single.named_parameters()]
    weights = {name: getattr(layer, f"{name.removesuffix('_l0')}_{suffix}").detach() for name in names}
    single.load_state_dict(weights, assign=True)
    state = None if start is None else start if layer.mode == "LSTM" else start[0]
    output, _ = single(x, state)
    return output, x.new_zeros(1, x.shape[1], output.shape[-1]) if start is None else start[0]
