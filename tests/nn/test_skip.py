from __future__ import annotations

import pytest
import torch
from torch import nn

from gracile.nn import Skip, build_layer


def test_the_first_tensor_comes_back_in_the_form_of_the_block_s_result() -> None:
    x, mask = torch.randn(2, 3), torch.zeros(2)
    assert Skip()(x, mask, flag=True) is x
    assert Skip()(hidden=x, mask=mask) is x
    assert Skip(outputs=1)(None, x) == (x,)
    found = Skip(outputs=3)(x)
    assert found[0] is x and found[1:] == (None, None)


@pytest.mark.parametrize("outputs", [None, 2])
def test_it_is_built_from_its_configuration(outputs: int | None) -> None:
    built = build_layer("Skip", {"outputs": outputs}, nn.Linear(2, 2))
    assert isinstance(built, Skip) and built.outputs == outputs and not list(built.parameters())
