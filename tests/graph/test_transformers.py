"""Models of the transformers library, tiny, built from a configuration: heads and hidden units are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.graph import check_cut, plan_resize, trace
from gracile.surgery import apply

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
TINY = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(hidden_size=32, intermediate_size=48, **TINY))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, **special)
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_key_value_heads=2, **TINY)
    )


def outputs(model: nn.Module) -> Tensor:
    """One forward with a batch whose second example is padded."""
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    return model(input_ids=IDS, attention_mask=mask)[0]


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """With weights large enough that every unit matters to the output."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


#: Model -> free units of a layer by kind: heads are cut whole, or by key head with all its query heads.
FREE: dict[str, tuple[Callable[[], nn.Module], set[tuple[str, int]]]] = {
    "bert": (bert, {("heads", 4), ("channels", 48)}),
    "gpt2": (gpt2, {("heads", 4), ("channels", 128)}),
    "llama": (llama, {("heads", 2), ("channels", 48)}),
}


@pytest.mark.parametrize("name", FREE)
def test_heads_and_hidden_units_are_cut_exactly(name: str) -> None:
    build, units = FREE[name]
    model = built(build)
    found = trace(model, outputs)
    groups = [g for g in found.groups if g.frozen is None and g.kind != "head_dim" and g.exact is None]
    assert {(g.kind, g.units) for g in groups} == units
    assert len(groups) >= 4
    keep: dict[str, Any] = {g.name: list(range(1, g.units)) for g in groups}
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(found, keep)])
    check = check_cut(model, cut, found, keep, outputs)
    assert check.ran, check.reason
    assert check.exact, check
    with torch.no_grad():
        assert not torch.allclose(outputs(model), outputs(cut), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FREE)
def test_everything_that_is_free_can_be_cut_at_once(name: str) -> None:
    model = built(FREE[name][0])
    found = trace(model, outputs)
    keep = {g.name: list(range(g.units - g.units // 4)) for g in found.groups if g.frozen is None}
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(found, keep)])
    assert sum(p.numel() for p in cut.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert outputs(cut).shape == outputs(model).shape
