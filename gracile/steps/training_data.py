"""A held-out part of the training data, on which the best epoch is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from gracile.data import Batch
from gracile.errors import DataError


@dataclass(frozen=True)
class Split:
    """Training batches and held-out ones.

    train: re-iterable; its order follows torch's global random state, which the training loop seeds for each epoch.
    validation: re-iterable, in a fixed order; empty where there is too little to hold out.
    batches: how many batches one epoch has.
    note: how the split was made, for the report.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch]
    batches: int
    note: str


def split_training(train: Iterable[Batch], fraction: float, generator: torch.Generator) -> Split:
    """Hold out about `fraction` of the training examples.

    A DataLoader over an indexed dataset is split by examples, so that shuffling cannot mix the parts; anything else by
    batches: those at fixed, randomly chosen positions are held out.
    """
    if isinstance(train, DataLoader) and _splittable(train):
        return _split_examples(train, fraction, generator)
    batches = list(train) if isinstance(train, (list, tuple)) else None
    count = len(batches) if batches is not None else sum(1 for _ in train)
    if count == 0:
        raise DataError("The training data hold no batches.")
    held = max(1, round(fraction * count)) if count > 1 and fraction > 0 else 0
    positions = set(torch.randperm(count, generator=generator)[:held].tolist())
    note = (
        f"{held} of {count} batches held out to choose the epoch"
        if held
        else "no data held out; the last epoch is kept"
    )
    if batches is not None:
        kept = [b for i, b in enumerate(batches) if i not in positions]
        return Split(_Shuffled(kept), [batches[i] for i in sorted(positions)], len(kept), note)
    return Split(_At(train, positions, False), _At(train, positions, True), count - held, note)


def _splittable(loader: DataLoader[Any]) -> bool:
    return (
        loader.batch_size is not None
        and hasattr(loader.dataset, "__len__")
        and hasattr(loader.dataset, "__getitem__")
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
    )


def _split_examples(loader: DataLoader[Any], fraction: float, generator: torch.Generator) -> Split:
    count = len(loader.dataset)  # type: ignore[arg-type]
    if count == 0:
        raise DataError("The training data hold no examples.")
    held = max(1, round(fraction * count)) if count > 1 and fraction > 0 else 0
    order = torch.randperm(count, generator=generator).tolist()

    def part(indices: list[int], shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            Subset(loader.dataset, indices),
            batch_size=loader.batch_size,
            shuffle=shuffle,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last and shuffle and len(indices) > (loader.batch_size or 1),
        )

    train = part(sorted(order[held:]), isinstance(loader.sampler, RandomSampler))
    validation = part(sorted(order[:held]), False) if held else []
    note = f"{held} of {count} training examples held out to choose the epoch"
    return Split(train, validation, len(train), note)


@dataclass(frozen=True)
class _Shuffled:
    """Batches in a new order at each pass."""

    batches: list[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for i in torch.randperm(len(self.batches)).tolist():
            yield self.batches[i]


@dataclass(frozen=True)
class _At:
    """The batches at the given positions, or those at all others."""

    source: Iterable[Batch]
    positions: set[int]
    inside: bool

    def __iter__(self) -> Iterator[Batch]:
        return (b for i, b in enumerate(self.source) if (i in self.positions) == self.inside)
