"""The function mode under which stacked recurrent layers are traced one by one.

PyTorch runs all layers and directions of an `nn.RNNBase` in one call that takes their initial states, and gives back
the final ones, as one tensor [layers · directions, batch, hidden]. Traced as it stands, that tensor would make every
layer keep the same hidden units. But zeros are the initial state of any choice of units, and final states that nobody
reads tie nothing. Here each layer and direction gets zeros of its own, of which only the number must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from gracile.graph.algebra import unify
from gracile.graph.axes import COUNTS_STACKED, fresh
from gracile.graph.recorder import Recorder
from gracile.graph.values import NOWHERE, Value

#: Functions of PyTorch that run stacked layers: (input, states, weights, biases?, layers, dropout, training, both
#: directions?, batch first?). Of packed sequences they take the batch sizes second, and run as they are.
STACKED = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})


class Layerwise(TorchFunctionMode):
    """Runs each layer and direction of a recurrent module by itself where its initial states are zeros."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in STACKED and self._can_be_parted(args) and not kwargs:
            return self._run(func, *args)
        return func(*args, **(kwargs or {}))

    def _can_be_parted(self, args: tuple[Any, ...]) -> bool:
        if len(args) != 9 or not isinstance(args[2], list):
            return False
        layers, dropout, training, both = args[4:8]
        several = layers * (2 if both else 1) > 1
        return several and not (training and dropout) and all(map(self.recorder.is_zeros, _states(args[1])))

    def _run(
        self,
        func: Any,
        x: Tensor,
        given: Tensor | tuple[Tensor, ...],
        weights: list[Tensor],
        biases: bool,
        layers: int,
        dropout: float,
        training: bool,
        both: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        directions = 2 if both else 1
        each = len(weights) // (int(layers) * directions)
        time = 1 if batch_first else 0
        finals: list[Sequence[Tensor]] = []
        for _ in range(int(layers)):
            outputs = []
            for backward in range(directions):
                own = tuple(self._zeros(state, first=not finals) for state in _states(given))
                taken = weights[len(finals) * each : (len(finals) + 1) * each]
                fed = x.flip(time) if backward else x
                out, *states = func(
                    fed, own if isinstance(given, tuple) else own[0], taken, biases, 1, 0.0, False, False, batch_first
                )
                outputs.append(out.flip(time) if backward else out)
                finals.append(states)
            x = torch.cat(outputs, dim=-1) if both else outputs[0]
        return (x, *(self._stacked(states) for states in zip(*finals)))

    def _zeros(self, state: Tensor, first: bool) -> Tensor:
        """Zeros for one layer, whose number of units is that of the state given; the first layer's are its units."""
        zeros = state.new_zeros((1, *state.shape[1:]))
        if first:
            unify(self.recorder.value(zeros).dims[-1], self.recorder.value(state).dims[-1])
        return zeros

    def _stacked(self, states: Sequence[Tensor]) -> Tensor:
        """Final states of all layers as one tensor, whose dimensions become one only if something reads it."""
        with _disable_current_modes():
            joined = torch.cat(list(states))

        def value() -> Value:
            first, *others = (self.recorder.value(state).dims for state in states)
            for dims in others:
                for mine, its in zip(first[1:], dims[1:]):
                    unify(mine, its)
            return Value([fresh(len(states), COUNTS_STACKED), *first[1:]], [NOWHERE] * joined.ndim)

        self.recorder.defer(joined, value)
        return joined


def _states(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return given if isinstance(given, tuple) else (given,)
