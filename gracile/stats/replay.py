"""Forwards that start where a layer is: what ran before it is replayed from its outputs, not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gracile.data import Batch, Data, logits_of
from gracile.stats.sums import read_inputs
from gracile.stats.timeline import Timeline, follow

#: What outputs of all batches may take together; a model that needs more is run from its start each time.
HELD_BYTES = 2 << 30


class Replay:
    """Forwards of fixed batches through a model that changes layer after layer, in the order in which it calls them.

    After `seek(layer)`, modules that end before the layer begins give the outputs that they gave when they last ran;
    the model must not change before that layer any more. Of these only what is still read is held, of a chain of blocks
    the last one's output; the others give NaN, which takes no memory. On one batch the layer's input is compared with
    that of a forward from the start; where they differ in any bit (modules that keep a state, say) nothing is replayed.
    """

    def __init__(self, model: nn.Module, data: Data, batches: Sequence[Batch]) -> None:
        self.model, self.data, self.batches = model, data, batches
        self.works = len(batches) > 0
        self._timeline: Timeline | None = None
        self._wanted: list[str] = []
        self._read: set[str] = set()
        self._start = -1
        self._held: list[dict[str, Any]] = [{} for _ in batches]

    def run(self, index: int, *, gradients: bool = False) -> Any:
        """The model's outputs on one batch. gradients: of the parameters behind the layer, no others asking for any."""
        with torch.set_grad_enabled(gradients):
            return self._run(index)

    def _run(self, index: int) -> Any:
        if not self.works:
            return self.data.forward(self.model, self.batches[index])
        held = self._held[index]
        found: dict[str, Any] = {}
        try:
            with _giving(self.model, held), _noting(self.model, [n for n in self._wanted if n not in held], found):
                return self.data.forward(self.model, self.batches[index])
        finally:  # a forward may be stopped behind the layer
            everything = held | found
            kept = {name: everything[name] for name in self._wanted if name in everything}
            if len(kept) == len(self._wanted):  # what reads the others will not run again
                kept = {name: y if name in self._read else _without_values(y) for name, y in kept.items()}
            self._held[index] = kept

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The model's main output on each batch."""
        return [logits_of(self.run(i)) for i in range(len(self.batches))]

    def seek(self, layer: str) -> None:
        """Let forwards start at this layer. The model has to be in eval mode."""
        if not self.works:
            return
        if self._timeline is None:
            self._timeline = follow(self.model, lambda: self.data.forward(self.model, self.batches[0]))
        if layer not in self._timeline.spans:
            self.clear()
            self._wanted = []
            return
        start = self._timeline.spans[layer][0]
        if start < self._start:
            self.clear()
        self._start, self._wanted = start, self._timeline.ended_before(start)
        self._read = self._timeline.read_without(self._wanted)
        expected = read_inputs(self.model, [layer], lambda model: self.data.forward(model, self.batches[0]))
        found = read_inputs(self.model, [layer], lambda model: self.run(0))
        again = read_inputs(self.model, [layer], lambda model: self.run(0))
        same = all(_equal(expected[layer], each[layer]) for each in (found, again))
        if not same or self._nbytes() > HELD_BYTES:
            self.clear()
            self.works = False

    def clear(self) -> None:
        """Forget all outputs."""
        self._held = [{} for _ in self.batches]
        self._start = -1

    def held(self) -> list[Tensor]:
        """The outputs held, of all batches."""
        return [leaf for leaf in tree_leaves(self._held) if isinstance(leaf, Tensor)]

    def _nbytes(self) -> int:
        """What those of all batches will take, by the first."""
        return sum(t.untyped_storage().nbytes() for t in tree_leaves(self._held[0]) if isinstance(t, Tensor)) * len(
            self.batches
        )


@contextmanager
def _giving(model: nn.Module, held: dict[str, Any]) -> Iterator[None]:
    """These modules return copies of the outputs held: what comes after may write into them."""
    modules = {name: model.get_submodule(name) for name in held}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = lambda *_args, output=held[name], **_kwargs: _copied(output)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


@contextmanager
def _noting(model: nn.Module, names: Sequence[str], found: dict[str, Any]) -> Iterator[None]:
    handles = []
    for name in names:

        def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            found[name] = _copied(output)

        handles.append(model.get_submodule(name).register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _equal(a: Any, b: Any) -> bool:
    """Whether two inputs, tensors or packed sequences, are the same in every bit."""
    leaves = [tree_leaves(each) for each in (a, b)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*leaves, strict=True))


def _without_values(output: Any) -> Any:
    """The same shapes and types, NaN or zero throughout, in the memory of one value."""

    def empty(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.new_full((), torch.nan if leaf.is_floating_point() else 0).expand(leaf.shape)

    return tree_map(empty, output)


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and _has_values(leaf) else leaf, output)


def _has_values(leaf: Tensor) -> bool:
    return leaf.ndim == 0 or any(leaf.stride())
