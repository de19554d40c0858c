"""A held-out part of the training data, on which the best epoch is chosen; and batches of mixed examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, Subset

from gracile.data import Batch, batch_size, map_examples
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

    A DataLoader over an indexed dataset is split by examples, of those that its sampler draws, so that shuffling cannot
    mix the parts; anything else by batches: those at fixed, randomly chosen positions are held out, which keeps the
    parts apart if its batches come in the same order each time.
    """
    if isinstance(train, DataLoader) and _splittable(train):
        return _split_examples(train, fraction, generator)
    batches = list(train) if isinstance(train, (list, tuple)) else None
    count = len(batches) if batches is not None else sum(1 for _ in train)
    if count == 0:
        raise DataError("The training data hold no batches.")
    held = _held(count, fraction)
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


def mix_examples(batch: Batch, share: float = 1.0) -> Batch:
    """λ x + (1 − λ) x_π: examples mixed with others of the batch, each by a λ of its own, uniform in [0, 1].

    share: the probability that an example is mixed, in [0, 1]; λ is 1 for the others. Every tensor of real numbers
    whose first axis is the batch is mixed by the same λ [examples] and permutation π, drawn from torch's global random
    state; others stay as they are. Raises DataError where there is none, as with token ids.
    Source: mixup with α = 1, Zhang et al. 2018, arXiv:1710.09412, here without labels. With one λ for a whole batch, as
    there, every batch has a variance of its own, and batch norms keep statistics that no batch has.
    """
    count = batch_size(batch)
    weights = torch.where(torch.rand(count) < share, torch.rand(count), torch.ones(()))
    order = torch.randperm(count)
    mixed = 0

    def mix(x: Tensor) -> Tensor:
        nonlocal mixed
        if not x.is_floating_point():
            return x
        mixed += 1
        weight = weights.to(x).view(-1, *[1] * (x.ndim - 1))
        return torch.lerp(x[order.to(x.device)], x, weight)

    batch = map_examples(batch, mix)
    if not mixed:
        raise DataError(
            "Examples cannot be mixed: the batch holds no tensor of real numbers with an entry for each.\n"
            "  Leave mixup at 0 for token ids."
        )
    return batch


def _held(count: int, fraction: float) -> int:
    """How many of `count` are held out: at least one if any, and never all."""
    return min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0


def _splittable(loader: DataLoader[Any]) -> bool:
    return (
        loader.batch_size is not None  # a batch sampler of the user's own deals in batches
        and hasattr(loader.dataset, "__len__")
        and hasattr(loader.dataset, "__getitem__")
        and isinstance(loader.sampler, Sized)
    )


def _split_examples(loader: DataLoader[Any], fraction: float, generator: torch.Generator) -> Split:
    sampler: Any = loader.sampler
    drawn = sorted(set(sampler))  # a sampler may leave out examples, which are then none of ours
    if not drawn:
        raise DataError("The training data hold no examples.")
    held = _held(len(drawn), fraction)
    order = torch.randperm(len(drawn), generator=generator).tolist()
    out = sorted(drawn[i] for i in order[:held])
    batch = loader.batch_size or 1

    def part(dataset: Any, sampler: Any, drop_last: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch,
            sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            drop_last=drop_last,
            worker_init_fn=loader.worker_init_fn,
        )

    kept = len(drawn) - held
    drop_last = loader.drop_last and kept > batch
    if type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == len(drawn):
        subset = Subset(loader.dataset, sorted(drawn[i] for i in order[held:]))
        shuffled = isinstance(sampler, RandomSampler)
        train = part(subset, RandomSampler(subset) if shuffled else SequentialSampler(subset), drop_last)
    else:
        train = part(loader.dataset, _Without(sampler, frozenset(out)), drop_last)
    validation: Iterable[Batch] = part(Subset(loader.dataset, out), None, False) if held else []
    note = (
        f"{held} of {len(drawn)} training examples held out to choose the epoch"
        if held
        else "no data held out; the last epoch is kept"
    )
    return Split(train, validation, len(train), note)


class _Without(Sampler[int]):
    """What another sampler draws, less the examples held out."""

    def __init__(self, source: Any, out: frozenset[int]) -> None:
        self.source, self.out = source, out

    def __iter__(self) -> Iterator[int]:
        return (i for i in self.source if i not in self.out)

    def __len__(self) -> int:
        """About: how often a sampler draws an example again is not known."""
        return max(1, len(self.source) - len(self.out))


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
