"""When the modules of a model begin and end in a forward, and when what they give is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Timeline:
    """One forward, its events counted from 0.

    spans: module -> (when it begins, when it ends), of those that are called once and give tensors alone. reads:
    module -> when operators read what it gave, views of it included; the end of the forward, where the model gives it.
    """

    spans: dict[str, tuple[int, int]]
    reads: dict[str, list[int]]

    def ended_before(self, start: int) -> list[str]:
        """Modules that have ended by then, without those that ran inside another of them."""
        ended = sorted((span, name) for name, span in self.spans.items() if span[1] < start)
        outermost: list[str] = []
        last = -1
        for (_, end), name in ended:
            if end > last:
                outermost.append(name)
                last = end
        return outermost

    def read_without(self, names: Sequence[str]) -> set[str]:
        """Those of the modules whose outputs are read outside all of them."""
        spans = [self.spans[name] for name in names]
        return {n for n in names if any(not any(b < t < e for b, e in spans) for t in self.reads.get(n, ()))}


@torch.no_grad()
def follow(model: nn.Module, run: Callable[[], Any]) -> Timeline:
    """The timeline of a forward; run: feeds the model."""
    begins: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    others: set[str] = set()
    reads = _Reads()

    def on_begin(name: str) -> None:
        begins.setdefault(name, []).append(reads.tick())

    def on_end(name: str, output: Any) -> None:
        ends[name] = reads.tick()
        leaves = tree_leaves(output)
        if not all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves):
            others.add(name)
        reads.own(name, leaves)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: on_begin(name)))
            handles.append(module.register_forward_hook(lambda _m, _a, y, name=name: on_end(name, y)))
    try:
        with reads:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    reads.read(tree_leaves(output))
    spans = {n: (b[0], ends[n]) for n, b in begins.items() if len(b) == 1 and n in ends and n not in others}
    return Timeline(spans, {name: reads.times.get(name, []) for name in spans})


class _Reads(TorchDispatchMode):
    """Notes which modules' outputs each operator reads, by the memory that they lie in."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[int]] = {}
        self._owners: dict[int, set[str]] = {}
        self._time = -1

    def tick(self) -> int:
        """The number of the next event."""
        self._time += 1
        return self._time

    def own(self, name: str, leaves: Sequence[Any]) -> None:
        """What a module gives lies here."""
        for place in _places(leaves):
            self._owners.setdefault(place, set()).add(name)

    def read(self, leaves: Sequence[Any]) -> set[int]:
        """These are read now; the places of their memory."""
        time, places = self.tick(), _places(leaves)
        for place in places:
            for name in self._owners.get(place, ()):
                self.times.setdefault(name, []).append(time)
        return places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self.read(tree_leaves((args, kwargs)))
        output = func(*args, **(kwargs or {}))
        for place in _places(tree_leaves(output)) - read:  # new memory, at the address of some that was freed perhaps
            self._owners.pop(place, None)
        return output


def _places(leaves: Sequence[Any]) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()}
