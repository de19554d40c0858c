"""Numbers of tensors: the same while one lives, never given again, and nothing kept alive."""

from __future__ import annotations

import torch

from gracile.graph.identity import Identity


def test_a_tensor_keeps_its_number_and_others_have_others() -> None:
    identity = Identity(lambda _number: None)
    a, b = torch.zeros(2), torch.zeros(2)
    numbers = [identity.number(t) for t in (a, b, a, b)]
    assert numbers[:2] == numbers[2:] and numbers[0] != numbers[1]
    assert identity.tensor(numbers[0]) is a and identity.tensor(numbers[1]) is b


def test_numbers_of_the_dead_are_told_and_never_given_again() -> None:
    """Python gives the place of a tensor that is gone to the next one."""
    gone: list[int] = []
    identity = Identity(gone.append)
    numbers, places = [], set()
    for _ in range(50):
        tensor = torch.zeros(2)
        numbers.append(identity.number(tensor))
        places.add(id(tensor))
        del tensor
    assert len(places) < 50 and len(set(numbers)) == 50
    assert gone == numbers
    assert identity.tensor(numbers[0]) is None
