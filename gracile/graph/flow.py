"""Which layer or operator reads the output of which layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gracile.graph.values import Event

State = tuple[int, int]
#: Operators that pass values on unchanged.
COPIES = frozenset({"clone", "contiguous", "_to_copy", "alias", "detach", "native_dropout", "dropout", "identity"})
#: Operators that scale what they give by as much as what they are given, each channel by itself.
HOMOGENEOUS = frozenset(
    {"relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d"}
    | {"adaptive_avg_pool2d", "_adaptive_avg_pool2d"}
)
SUMS = frozenset({"add", "cat", "stack", "sub"})


class Flow:
    """Answers from the operators recorded, and the tensor states that went in and out of each layer."""

    def __init__(
        self,
        events: Sequence[Event],
        outputs: Mapping[str, list[State]],
        inputs: Mapping[str, list[State]],
        layers: Mapping[str, nn.Module],
        returned: Iterable[State],
    ) -> None:
        self._outputs, self._inputs, self._layers = outputs, inputs, frozenset(layers)
        self._norms = [name for name, layer in layers.items() if isinstance(layer, _BatchNorm)]
        self._products = {name for name, layer in layers.items() if isinstance(layer, (_ConvNd, nn.Linear))}
        self._returned = set(returned)
        self._readers: dict[State, list[Event]] = {}
        for event in events:
            for state in dict.fromkeys(event.reads):
                self._readers.setdefault(state, []).append(event)

    def consumers(self, layer: str) -> tuple[str, ...]:
        """Names of what reads the layer's output, in order, each once."""
        found: dict[str, None] = {}
        for state in self._outputs.get(layer, ()):
            found.update(dict.fromkeys(self._name(event) for event in self._external(state, layer)))
        return tuple(found)

    def consumers_behind(self, layer: str, operators: Collection[str]) -> tuple[str, ...]:
        """Names of what reads the layer's output or what these operators and copies make of it, they left out."""
        found: dict[str, None] = {}
        waiting, seen = list(self._outputs.get(layer, ())), set[State]()
        passed = COPIES.union(operators)
        while waiting:
            state = waiting.pop(0)
            if state in seen:
                continue
            seen.add(state)
            for event in self._external(state, layer):
                if event.layer not in self._layers and event.op in passed:
                    waiting.extend(event.makes)
                else:
                    found[self._name(event)] = None
        return tuple(found)

    def feeds_sum(self, layer: str) -> bool:
        """Whether an output reaches an addition or concatenation through batch norms and copies only."""
        waiting = [(state, layer) for state in self._outputs.get(layer, ())]
        seen: set[State] = set()
        while waiting:
            state, made_by = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            for event in self._external(state, made_by):
                if event.layer in self._layers and event.layer is not None:
                    if event.layer in self._norms:
                        waiting.extend((s, event.layer) for s in self._outputs.get(event.layer, ()))
                elif event.op in SUMS:
                    return True
                elif event.op in COPIES:
                    waiting.extend((made, made_by) for made in event.makes)
        return False

    def batch_norm_pairs(self) -> list[tuple[str, str]]:
        """(convolution or linear, batch norm) that always run one after the other, with nothing else reading."""
        producers = {
            states[0]: name for name, states in self._outputs.items() if len(states) == 1 and name in self._products
        }
        pairs = []
        for norm in self._norms:
            states = self._inputs.get(norm, [])
            if len(states) != 1 or states[0] in self._returned:
                continue
            layer = producers.get(states[0])
            if layer is not None and {event.layer for event in self._external(states[0], layer)} == {norm}:
                pairs.append((layer, norm))
        return pairs

    def homogeneous_pairs(self) -> list[tuple[str, str]]:
        """(layer, layer) of convolutions or linear layers, the second alone reading what the first gives, with nothing
        but copies and functions f(c · x) = c · f(x), c > 0, of each channel in between."""
        readers = {
            states[0]: name for name, states in self._inputs.items() if len(states) == 1 and name in self._products
        }
        pairs = []
        for name in sorted(self._products, key=list(self._outputs).index):
            states = self._outputs.get(name, [])
            state = states[0] if len(states) == 1 else None
            while state is not None and state not in self._returned:
                # What autograd keeps for the backward pass is a copy that nothing reads.
                found = self._external(state, name)
                events = [e for e in found if e.op != "detach" or any(made in self._readers for made in e.makes)]
                reader = readers.get(state)
                if reader is not None and {event.layer for event in events} == {reader}:
                    pairs.append((name, reader))
                    break
                passes = len(events) == 1 and events[0].layer is None and events[0].op in HOMOGENEOUS | COPIES
                state = events[0].makes[0] if passes and events[0].makes else None
        return pairs

    def _external(self, state: State, layer: str) -> list[Event]:
        """Readers of the state outside the layer that made it."""
        return [event for event in self._readers.get(state, ()) if event.layer != layer]

    def _name(self, event: Event) -> str:
        return f"module:{event.layer}" if event.layer in self._layers else event.op
