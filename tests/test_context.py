from __future__ import annotations

import torch
from torch import nn

from gracile.context import Context, Progress, derive_seed
from gracile.data import Data


def fnv1a(data: bytes, basis: int) -> int:
    for byte in data:
        basis = (basis ^ byte) * 0x100000001B3 % 2**64
    return basis


def test_derived_seeds_are_fnv_1a_and_the_same_everywhere() -> None:
    basis = 0xCBF29CE484222325
    # The published test vector of FNV-1a 64 for "foobar" is 85944171f73967e8.
    assert fnv1a(b"foobar", basis) == 0x85944171F73967E8
    assert derive_seed(5, "a", 3) == fnv1a(b"5\x1fa\x1f3", basis) >> 1


def test_derived_seeds_differ_by_seed_and_purpose() -> None:
    purposes: tuple[tuple[int | str, ...], ...] = (
        (),
        (0,),
        (1,),
        ("a",),
        ("b",),
        ("a", 1),
        ("a", 2),
        ("ab",),
        ("a", "b"),
    )
    seeds = [derive_seed(s, *p) for s in (0, 1, 2, 3, 10, -1, 2**40) for p in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_and_progress() -> None:
    told: list[Progress] = []
    net = nn.Linear(1, 1)
    context = Context(Data(), net, net, seed=3, on_progress=told.append)
    first, again, other = (torch.rand(3, generator=context.generator(p)) for p in ("x", "x", "y"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    context.progress("phase", 1, None, "note")
    assert told == [Progress("phase", 1, None, "note")]
    Context(Data(), net, net).progress("unheard", 0, 1)
