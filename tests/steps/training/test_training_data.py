from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gracile.errors import DataError
from gracile.steps.training.training_data import Split, mix_examples, split_training


def dataset(count: int = 40) -> TensorDataset:
    return TensorDataset(torch.arange(count), torch.zeros(count))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(batches: Any) -> list[int]:
    return [int(value) for batch in batches for value in batch[0]]


def epochs(split: Split, count: int = 4) -> list[list[int]]:
    passes = []
    for epoch in range(count):
        torch.manual_seed(epoch)
        passes.append(seen(split.train))
    return passes


LOADERS = {
    "in order": lambda: DataLoader(dataset(), batch_size=8),
    "shuffled": lambda: DataLoader(dataset(), batch_size=8, shuffle=True),
    "last batch dropped": lambda: DataLoader(dataset(), batch_size=7, shuffle=True, drop_last=True),
    "weighted": lambda: DataLoader(dataset(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 60)),
    "with replacement": lambda: DataLoader(
        dataset(), batch_size=8, sampler=RandomSampler(dataset(), replacement=True, num_samples=50)
    ),
    "a part": lambda: DataLoader(dataset(), batch_size=8, sampler=SubsetRandomSampler(range(10, 40))),
    "a list": lambda: [(torch.arange(i, i + 5), torch.zeros(5)) for i in range(0, 40, 5)],
    "batches dealt in order": lambda: DataLoader(
        dataset(), batch_sampler=BatchSampler(torch.utils.data.SequentialSampler(dataset()), 5, False)
    ),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.9, 0.999])
def test_what_is_held_out_is_never_trained_on_in_any_epoch(name: str, fraction: float) -> None:
    torch.manual_seed(0)
    split = split_training(LOADERS[name](), fraction, generator())
    held = set(seen(split.validation))
    passes = epochs(split)
    assert held and all(held.isdisjoint(p) for p in passes) and all(passes)
    assert seen(split.validation) == seen(split.validation)
    if name == "a part":
        assert min(held) >= 10 and min(min(p) for p in passes) >= 10  # what the sampler leaves out stays out
    if name in ("in order", "shuffled", "a list", "batches dealt in order"):
        assert all(sorted([*held, *p]) == list(range(40)) for p in passes)
        assert all(sum(1 for _ in split.train) == split.batches for _ in range(2))


def test_the_share_held_out_and_its_note() -> None:
    for loader, held in (("shuffled", 10), ("a list", 10)):
        split = split_training(LOADERS[loader](), 0.25, generator())
        assert len(seen(split.validation)) == held
    assert split_training(LOADERS["shuffled"](), 0.25, generator()).note.startswith("10 of 40 training examples held")
    assert split_training(LOADERS["a list"](), 0.25, generator()).note.startswith("2 of 8 batches held")


def test_order_follows_the_global_seed_and_the_loader_s_own_wish() -> None:
    shuffled = split_training(LOADERS["shuffled"](), 0.1, generator())
    first, second, *_ = epochs(shuffled)
    assert first != second and epochs(shuffled)[0] == first
    ordered = split_training(LOADERS["in order"](), 0.1, generator())
    assert all(p == sorted(p) for p in epochs(ordered))


def test_the_part_held_out_follows_the_generator() -> None:
    parts = [set(seen(split_training(LOADERS["shuffled"](), 0.2, generator(s)).validation)) for s in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize("data", [dataset(1), dataset(3)], ids=len)
def test_small_data_keep_something_to_train_on(data: TensorDataset) -> None:
    split = split_training(DataLoader(data, batch_size=2, shuffle=True), 0.9, generator())
    assert len(seen(split.train)) == 1 and len(seen(split.validation)) == len(data) - 1
    assert split.batches == 1


def test_nothing_is_held_out_of_one_batch_or_where_not_wanted() -> None:
    one = [(torch.arange(4), torch.zeros(4))]
    for split in (
        split_training(one, 0.5, generator()),
        split_training(LOADERS["a list"](), 0.0, generator()),
        split_training(LOADERS["shuffled"](), 0.0, generator()),
    ):
        assert not seen(split.validation) and seen(split.train)
        assert split.note == "no data held out; the last epoch is kept"


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter((torch.tensor(i), torch.tensor(0)) for i in range(20))


def test_a_stream_is_split_by_the_position_of_its_batches() -> None:
    split = split_training(DataLoader(Stream(), batch_size=4), 0.2, generator())
    assert split.batches == 4 and len(seen(split.validation)) == 4
    assert sorted(seen(split.train) + seen(split.validation)) == list(range(20))


class Augmented(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, 0


def test_collation_and_worker_settings_are_the_loader_s() -> None:
    def collate(items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return torch.tensor([100 + i for i, _ in items]), torch.zeros(len(items))

    def prepare(worker: int) -> None: ...

    loader = DataLoader(Augmented(), batch_size=3, collate_fn=collate, worker_init_fn=prepare)
    split = split_training(loader, 0.25, generator())
    assert Counter(seen(split.train) + seen(split.validation)) == Counter(range(100, 112))
    assert isinstance(split.train, DataLoader) and split.train.worker_init_fn is prepare


@pytest.mark.parametrize("empty", [[], (), DataLoader([], batch_size=2)], ids=["list", "tuple", "loader"])  # type: ignore[arg-type]
def test_no_data_are_refused(empty: Any) -> None:
    with pytest.raises(DataError, match="hold no"):
        split_training(empty, 0.1, generator())


def test_examples_are_mixed_in_pairs_each_by_its_own_weight_and_whole_numbers_are_not() -> None:
    torch.manual_seed(3)
    x, y, ids = torch.arange(12.0).reshape(6, 2), torch.arange(6.0).reshape(6, 1, 1), torch.arange(6)
    mixed = mix_examples({"x": x, "y": y, "ids": ids, "scale": torch.tensor(2.0)})
    # Rows are 2i, 2i + 1: λ i + (1 − λ) π(i) can be read off both tensors and must be the same in them.
    place = (mixed["x"][:, 0] / 2).tolist()
    assert place == pytest.approx(mixed["y"].flatten().tolist()) and all(0 <= p <= 5 for p in place)
    assert torch.allclose(mixed["x"][:, 1] - mixed["x"][:, 0], torch.ones(6))
    assert sum(place) != pytest.approx(15, abs=0.1), "one weight for all of a permutation would keep the sum"
    assert torch.equal(mixed["ids"], ids) and float(mixed["scale"]) == 2


def test_a_share_of_the_examples_is_mixed() -> None:
    torch.manual_seed(3)
    x = torch.arange(10_000.0)
    changed = float((mix_examples(x, 0.3) != x).float().mean())
    assert changed == pytest.approx(0.3, abs=0.02)  # four standard deviations of a share of 10,000 draws
    assert torch.equal(mix_examples(x, 0.0), x)


def test_token_ids_are_not_mixed() -> None:
    ids = torch.arange(6)
    with pytest.raises(DataError, match="token ids"):
        mix_examples({"ids": ids})
