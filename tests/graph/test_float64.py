"""A forward in float64: as precise as a float64 copy of the model, whatever types its code asks for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ZOO, example_for
from torch import Tensor, nn

from gracile.graph.float64 import computing_in_float64


@pytest.mark.parametrize("name", ["PlainConv", "BiLSTM", "BiGRU", "AttentionEncoder", "TiedEmbedding", "GroupNormNet"])
def test_the_same_as_a_copy_in_float64(name: str) -> None:
    model = ZOO[name]()
    batch = example_for(model)
    inputs = batch if isinstance(batch, tuple) else (batch,)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*wide)
    with computing_in_float64(model):
        found = model(*inputs)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


class Narrowing(nn.Module):
    """Casts down inside, as norms of language models do, and compares types of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.rand(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16).float()
        x = F.softmax(x * self.scale, dim=-1, dtype=torch.float32)
        return self.fc(x.to(self.fc.weight.dtype) + torch.ones(6, dtype=torch.float16))


def test_casts_to_lower_precision_are_ignored() -> None:
    torch.manual_seed(0)
    model, x = Narrowing(), torch.randn(5, 6)
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    scores = torch.from_numpy(x.double().numpy() * w["scale"]).softmax(-1).numpy()
    with computing_in_float64(model):
        found = model(x)
    expected = (scores + 1) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_changes_are_made_to_what_is_used_and_not_to_the_model() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()

    def clear(weight: Tensor) -> None:
        assert weight.dtype == torch.float64 and torch.equal(weight, before.double())
        weight.zero_()

    with computing_in_float64(model, {"weight": clear}):
        found = model(torch.randn(4, 3))
    torch.testing.assert_close(found, model.bias.detach().double().expand(4, 2))
    assert torch.equal(model.weight, before)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * self.seen


def test_what_a_forward_writes_into_a_buffer_is_read_back_and_does_not_stay() -> None:
    model = Counting()
    with computing_in_float64(model):
        model(torch.ones(2))
        found = model(torch.ones(2))
    assert found.tolist() == [2, 2]
    assert model.seen.tolist() == [0, 0]


def test_grouped_products_equal_products_one_by_one() -> None:
    a, b = torch.randn(7, 8), torch.randn(3, 8, 4)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    with computing_in_float64(nn.Identity()):
        found = torch._grouped_mm(a, b, offs=ends)
    expected = torch.cat([a[:2].double() @ b[0].double(), a[2:].double() @ b[2].double()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
