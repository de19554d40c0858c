"""What a block gets and gives in a compressed model and in its original, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gracile.context import Context
from gracile.data import Batch
from gracile.stats.sums import read_call

#: What inputs and outputs of one block may take together; of more calibration batches only the first are used.
HELD_BYTES = 2 << 30


@dataclass(frozen=True)
class Call:
    """One batch at a block: what it gets now, what it got in the original, and what it gave there."""

    present: tuple[Any, Any]
    original: tuple[Any, Any]
    target: Tensor

    def part(self, rows: Tensor, drop: float = 0.0) -> tuple[tuple[Any, Any], Tensor]:
        """Inputs and targets of these examples, copied; some values of the inputs are the original's."""
        examples = len(self.target)

        def take(leaf: Any, other: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.ndim == 0 or len(leaf) != examples:
                return leaf.clone()
            if drop == 0 or not leaf.is_floating_point() or leaf.shape != other.shape:
                return leaf[rows]
            mine, theirs = leaf[rows], other[rows]
            return torch.where(torch.rand_like(mine) < drop, theirs, mine)

        return tree_map(take, self.present, self.original), self.target[rows]

    def rows(self, count: int | None = None) -> Tensor:
        """`count` examples drawn at random, or all of them in order."""
        order = torch.arange(len(self.target)) if count is None else torch.randperm(len(self.target))[:count]
        return order.to(self.target.device)

    @torch.no_grad()
    def divides(self, block: nn.Module) -> bool:
        """Whether the block makes of a few examples what it makes of them among all: not where they are mixed, say."""
        (args, kwargs), _ = self.part(self.rows())
        whole = main_output(block(*args, **kwargs))
        few = self.rows()[::2]
        try:
            (args, kwargs), _ = self.part(few)
            return torch.allclose(main_output(block(*args, **kwargs)), whole[few], rtol=1e-3, atol=1e-5)
        except (RuntimeError, IndexError, ValueError):  # shapes that no longer fit
            return False


class Calls:
    """Runs of both models, stopped at a block."""

    def __init__(self, model: nn.Module, reference: nn.Module, block: str, context: Context) -> None:
        self.model, self.reference, self.block, self.context = model, reference, block, context

    @torch.no_grad()
    def of(self, batches: Sequence[Batch]) -> list[Call]:
        """What the block gets and should give on these batches, or on the first of them that there is room for.

        None at all where it gives another shape now than in the original: other tokens come to it.
        """
        calls: list[Call] = []
        for batch in batches:
            present, output = self._run(self.model, batch)
            original, target = self._run(self.reference, batch)
            if output.shape != target.shape:
                return []
            calls.append(Call(present, original, target))
            size = sum(t.nbytes for t in tree_leaves((present, original, target)) if isinstance(t, Tensor))
            if size * (len(calls) + 1) > HELD_BYTES:
                break
        return calls

    def _run(self, model: nn.Module, batch: Batch) -> tuple[tuple[Any, Any], Tensor]:
        block = model.get_submodule(self.block)
        args, kwargs, output = read_call(block, lambda: self.context.data.forward(model, batch))
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return copied, main_output(output).clone()


def main_output(output: Any) -> Tensor:
    """The first tensor of an output."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
