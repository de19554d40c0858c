"""What is known of a tensor while a model is traced, and what is noted of each operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracile.graph.axes import Expr

#: An axis of a parameter or buffer: its name and the axis.
Axis = tuple[str, int]
NOWHERE: frozenset[Axis] = frozenset()


@dataclass
class Value:
    """What is known of a tensor.

    dims: one expression per dimension.
    sources: for each dimension, the parameter axes whose entries it holds; filled only while `is_weight`.
    is_weight: made from parameters and constants alone, without data.
    """

    dims: list[Expr]
    sources: list[frozenset[Axis]]
    is_weight: bool = False


@dataclass(frozen=True)
class MacTerm:
    """Multiply-accumulates of one operator: the product of the sizes of all factors in `volume`."""

    layer: str
    volume: Expr


@dataclass(frozen=True)
class Event:
    """One operator run: its name, the innermost layer it ran in, and the tensor states that it read and made."""

    op: str
    layer: str | None
    reads: tuple[tuple[int, int], ...]
    makes: tuple[tuple[int, int], ...]


def storage_of(tensor: Tensor) -> int | None:
    """Identity of the tensor's memory; None for layouts that have none of their own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
    elif isinstance(tree, Iterable) and isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
