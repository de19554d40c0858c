"""Every net of the zoo, cut by about 28 % of the units of every group at once, equals itself with those units zeroed.

In float64; 1e-10 leaves five digits for sums taken in another order. Where an operator runs over a cut axis, the two
differ by nature, and the net must still run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import ZOO, example_for
from torch import Tensor, nn

from gracile.graph import Group, Trace, check_cut, cut_macs, plan_resize, trace
from gracile.surgery import apply

#: Free groups as "name=units", "~" where cutting is not exact: worked out by hand from each net's structure.
FREE = {
    "MLP": "fc1=16 fc2=12",
    "PlainConv": "conv1=8 conv2=12",
    "FlattenConv": "body.0=8 head.0=10",
    "PadShortcut": "conv1=8 blocks.0.conv1=8 blocks.1.conv1=16 blocks.2.conv1=16 blocks.3.conv1=32",
    "ConvShortcut": "stem=12 reduce=6 mid=6 grow=20",
    "ConcatInput": "conv1=8 conv2=8 conv3=6",
    "Dense": "stem=8 convs.0=4 convs.1=4 convs.2=4",
    "Grouped": "conv1=4 conv1#2=4 conv2=8 conv3=12",  # groups; inputs per group; outputs per group
    "Depthwise": "stem=8 expand=24 squeeze=6",
    "DepthMultiplier": "stem=8 depth=2 point=6",
    "SqueezeExcite": "conv=16 down=6",
    "Shuffle": "stem=8 stem#2=8 branch.0=8 mix=10",
    "UNet": "down1=8 down2=12 up=8 merge=6",
    "GroupedTransposed": "stem=2 stem#2=4 up=6",
    "GroupNormNet": "stem=4~ conv1=3~",
    "InstanceNormNet": "conv1=8",
    "ChunkGate": "conv1=8 conv2=6",
    "GluConv1d": "conv1=8 conv2=10",
    "Shared": "stem=12",
    "Branches": "convs.0=4 convs.1=6 convs.2=8 out=8",
    "MultiplyAdd": "a=12",
    "AttentionEncoder": "embed=24~ attention:heads=4 attention:head_dim=6~ attention:head_dim#2=6 fc1=40",
    "PackedQKV": "embed=24 qkv:heads=4",
    "GroupedQuery": "embed=24~ qkv:heads=2 gate=32",
    "TiedEmbedding": "embed=24 fc1=30",
    "NanoGPT": "c_fc=36",
    "CrossAttention": "q:heads=3 q:head_dim=4~ kv:head_dim=4",
    "PatchMixer": "patch=16~ token1=12 channel1=28",
    "TabularEmbeddings": "tables.0=4 tables.1=6 fc1=20 fc2=12",
    "BiLSTM": "proj=10 lstm:hidden=8 lstm:hidden#2=8 lstm:hidden#3=8 lstm:hidden#4=8",  # by layer and direction
    "BiGRU": "gru:hidden=8",
    "ConvGRU": "conv=12 gru:hidden=10",
    "OwnCell": "input=10",
    "Literals": "fc1=10",
}


def runner(model: nn.Module) -> Callable[[nn.Module], Any]:
    batch = example_for(model)
    return lambda m: m(*batch) if isinstance(batch, tuple) else m(batch)


def random_keep(groups: list[Group], seed: int, fraction: float = 0.72) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {g.name: sorted(rng.sample(range(g.units), max(1, round(g.units * fraction)))) for g in groups}


def free(traced: Trace) -> list[Group]:
    return [group for group in traced.groups if group.frozen is None]


def cut_and_check(
    model: nn.Module, traced: Trace, keep: dict[str, list[int]], run: Callable[[nn.Module], Any]
) -> nn.Module:
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(traced, keep)])
    check = check_cut(model, cut, traced, keep, run)
    assert check.ran, check.reason
    if all(traced.group(name).exact is None for name in keep):
        assert check.exact, check
        assert check.max_error is not None
        assert check.max_error <= 1e-10
    else:
        assert check.exact or check.reason
    with torch.no_grad():
        before, after = run(model), run(cut)
    assert before.shape == after.shape
    # An equal output would mean that the units made no difference and nothing was tested.
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-6)
    return cut


@pytest.mark.parametrize("name", ZOO)
def test_what_can_be_cut_is_known(name: str) -> None:
    model = ZOO[name]()
    groups = free(trace(model, runner(model)))
    assert " ".join(f"{g.name}={g.units}{'~' if g.exact else ''}" for g in groups) == FREE[name]


@pytest.mark.parametrize("name", ZOO)
def test_all_groups_at_once(name: str) -> None:
    model = ZOO[name]()
    run = runner(model)
    traced = trace(model, run)
    keep = random_keep(free(traced), seed=len(name))
    cut = cut_and_check(model, traced, keep, run)
    assert cut_macs(traced, keep) == trace(cut, run).macs


@pytest.mark.parametrize("name", ZOO)
def test_each_group_alone_down_to_one_unit(name: str) -> None:
    model = ZOO[name]()
    run = runner(model)
    traced = trace(model, run)
    together: dict[str, list[Group]] = {}
    for group in free(traced):
        together.setdefault(group.tied_count or group.name, []).append(group)
    for groups in together.values():
        cut_and_check(model, traced, random_keep(groups, seed=3, fraction=0.0), run)


def test_exact_groups_of_inexact_nets_are_exact_alone() -> None:
    for name in ("AttentionEncoder", "GroupedQuery", "PatchMixer"):
        model = ZOO[name]()
        run = runner(model)
        traced = trace(model, run)
        groups = [g for g in free(traced) if g.exact is None and g.tied_count is None]
        assert groups
        cut_and_check(model, traced, random_keep(groups, seed=5), run)


class _Wrapped(nn.Module):
    """Linear, a module of PyTorch's own, linear."""

    def __init__(self, module: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.before, self.module, self.after = nn.Linear(8, 16), module, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = self.module(x, x, x) if isinstance(self.module, nn.MultiheadAttention) else self.module(x)
        return self.after(y[0] if isinstance(y, tuple) else y)


TORCH_MODULES: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: _Wrapped(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
    "pre-norm encoder": lambda: _Wrapped(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", norm_first=True),
            2,
            enable_nested_tensor=False,
        )
    ),
    "multi-head attention": lambda: _Wrapped(nn.MultiheadAttention(16, 4, batch_first=True, vdim=16)),
    "LSTM": lambda: _Wrapped(nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True), 24),
    "LSTM with projection": lambda: _Wrapped(nn.LSTM(16, 12, proj_size=6, batch_first=True), 6),
    "GRU": lambda: _Wrapped(nn.GRU(16, 12, 2, batch_first=True), 12),
    "RNN": lambda: _Wrapped(nn.RNN(16, 12, batch_first=True), 12),
    "RMS norm": lambda: _Wrapped(nn.RMSNorm(16)),
}


@pytest.mark.parametrize("name", TORCH_MODULES)
def test_modules_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    model = TORCH_MODULES[name]().eval()
    x = torch.randn(2, 5, 8)
    traced = trace(model, lambda m: m(x))
    groups = free(traced)
    assert groups
    cut_and_check(model, traced, random_keep(groups, seed=1), lambda m: m(x))


def test_heads_of_multihead_attention_are_frozen_since_it_derives_their_size_from_its_width() -> None:
    model = TORCH_MODULES["multi-head attention"]().eval()
    traced = trace(model, lambda m: m(torch.randn(2, 5, 8)))
    heads = [g for g in traced.groups if g.kind == "heads"]
    assert len(heads) == 1
    assert heads[0].units == 4
    assert heads[0].frozen is not None
    assert "would no longer fit" in heads[0].frozen
