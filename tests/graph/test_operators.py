"""Single operators and idioms, each in a net of two or three layers: what is free, what is frozen, and if it is right.

For each free group alone, at one unit and at about 70 %, the cut net runs, and equals the zeroed one where it says so.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.graph import Group, check_cut, plan_resize, trace
from gracile.surgery import apply


class Net(nn.Module):
    """Parts, integers and a forward given as a function of them."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self, *inputs)


@dataclass
class Case:
    """A net, the shape of its input, its free groups ("~": not exact) and the reasons of those frozen inside."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: str
    frozen: dict[str, str] = field(default_factory=dict)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def linear(a: int = 6, b: int = 8) -> nn.Linear:
    return nn.Linear(a, b)


def written(m: Net, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], m.n, dtype=x.dtype)
    y[:, : m.h] = m.a(x)
    y[:, m.h :] = m.b(x)
    return m.o(y)


def film(m: Net, x: Tensor) -> Tensor:
    scale, shift = m.f(x.mean((2, 3))).chunk(2, -1)
    return m.o(F.relu(m.bn(m.c(x)) * (1 + scale[:, :, None, None]) + shift[..., None, None])).mean((2, 3))


def nonlocal_block(m: Net, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    y = m.c(x)
    t, p, g = m.t(y).flatten(2).transpose(1, 2), m.p(y).flatten(2), m.g(y).flatten(2).transpose(1, 2)
    return m.o(y + m.w(((t @ p).softmax(-1) @ g).transpose(1, 2).reshape(b, -1, h, w)))


def channel_convolution(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.c(x))
    return m.o(y * torch.sigmoid(m.k(y.mean((2, 3)).unsqueeze(1)).squeeze(1))[:, :, None, None]).mean((2, 3))


def spatial_gate(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.c(x))
    gate = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    return m.o(y * torch.sigmoid(m.k(gate))).mean((2, 3))


def experts(m: Net, x: Tensor) -> Tensor:
    values, chosen = m.gate(x).softmax(-1).topk(2, -1)
    out = torch.stack([expert(x) for expert in m.e], 1)
    picked = out.gather(1, chosen[..., None].expand(-1, -1, out.shape[-1]))
    return m.o((picked * values[..., None]).sum(1))


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))


def partial_stage(m: Net, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, 1)
    return m.o(torch.cat([a, b, m.m(b)], 1))


def pad_to_width(m: Net, x: Tensor) -> Tensor:
    """A shortcut whose missing channels are zeros, their number computed from attribute and shape."""
    zeros = x.new_zeros(x.shape[0], m.n - x.shape[1], *x.shape[2:])
    return m.o(F.relu(m.b(F.relu(m.a(x))) + torch.cat([x, zeros], 1)))


def rotated(m: Net, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(m.a(x).view(x.shape[0], -1, 2).contiguous())
    return m.o(torch.view_as_real(pairs * torch.tensor(1j)).flatten(1))


def latents(m: Net, x: Tensor) -> Tensor:
    """Queries that are parameters attend to data: zeroing them, their weight and bias, is what a cut of them does."""
    weights = (m.q(m.z) @ m.k(x).transpose(1, 2)).softmax(-1)
    return m.o(weights @ m.v(x))


IMAGE, ROWS = (2, 3, 12, 12), (4, 6)
CASES: dict[str, Case] = {
    "circular, reflecting and replicating padding": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(6, 4, 3, padding="same", padding_mode="replicate"),
        ),
        IMAGE,
        "0=8 2=6",
    ),
    "unflatten and flatten of channels": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), nn.Conv2d(8, 4, 1)),
        IMAGE,
        "0=2 0#2=4",
    ),
    "pixel unshuffle and channel shuffle": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.PixelUnshuffle(2),
            nn.Conv2d(32, 6, 1),
            nn.ChannelShuffle(3),
            nn.Conv2d(6, 4, 1),
        ),
        IMAGE,
        "0=8 2=2",
    ),
    "unfold": Case(
        lambda: Net(
            lambda m, x: m.b(F.unfold(m.a(x), 3).transpose(1, 2)).mean(1), a=nn.Conv2d(3, 5, 3), b=linear(45, 4)
        ),
        IMAGE,
        "a=5",
    ),
    "windows of a sequence": Case(
        lambda: Net(
            lambda m, x: m.o(m.c(x).unfold(2, 3, 2).mean(3)).mean(2), c=nn.Conv1d(3, 8, 1), o=nn.Conv1d(8, 2, 1)
        ),
        (2, 3, 9),
        "c=8",
    ),
    "windows of the channels": Case(
        lambda: Net(lambda m, x: m.o(m.a(x).unfold(1, 4, 2).mean(2)), a=linear(6, 8), o=linear(3, 2)),
        ROWS,
        "",
        {"a": "'unfold' mixes its neighbours"},
    ),
    "samples at points that a layer gives": Case(
        lambda: Net(
            lambda m, x: m.o(F.grid_sample(m.c(x), m.p(x).permute(0, 2, 3, 1), align_corners=False)).mean((2, 3)),
            c=nn.Conv2d(3, 8, 1),
            p=nn.Conv2d(3, 2, 1),
            o=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "c=8",
        {"p": "'grid_sampler_2d' mixes its neighbours"},
    ),
    "local response norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 1)),
        IMAGE,
        "",
        {"0": "'avg_pool3d' mixes its neighbours"},
    ),
    "normalized vectors": Case(
        lambda: Net(lambda m, x: m.b(F.normalize(m.a(x))), a=linear(), b=linear(8, 2)), ROWS, "a=8~"
    ),
    "dot product of two towers": Case(
        lambda: Net(lambda m, x: (m.a(x) * m.b(x)).sum(-1), a=linear(), b=linear()), ROWS, "a=8~"
    ),
    "parametric activations and a softmax over channels": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.PReLU(), nn.Softmax2d(), nn.Conv2d(8, 3, 1)
        ),
        IMAGE,
        "0=8 2=8~",
    ),
    "pools and upsampling": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.LPPool2d(2, 2),
            nn.Conv2d(8, 6, 1),
            nn.AdaptiveMaxPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        IMAGE,
        "0=8 2=6",
    ),
    "three dimensions": Case(
        lambda: nn.Sequential(nn.Conv3d(1, 6, 2), nn.BatchNorm3d(6), nn.MaxPool3d(2), nn.Conv3d(6, 4, 1)),
        (2, 1, 5, 5, 5),
        "0=6",
    ),
    "one dimension": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 2),
            nn.AvgPool1d(2),
            nn.Conv1d(6, 8, 1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        (2, 3, 12),
        "0=6 2=8",
    ),
    "matrices as plain parameters": Case(
        lambda: Net(lambda m, x: F.relu(x @ m.w + m.c) @ m.v, w=parameter(6, 10), c=parameter(10), v=parameter(10, 3)),
        ROWS,
        "model=10",
    ),
    "projections to heads by einsum": Case(
        lambda: Net(
            lambda m, x: torch.einsum("bhk,hkd->bd", F.relu(torch.einsum("bd,dhk->bhk", x, m.w)), m.v),
            w=parameter(6, 3, 5),
            v=parameter(3, 5, 4),
        ),
        ROWS,
        "model=3 model#2=5",
    ),
    "weight norm": Case(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.ReLU(), linear(8, 3)), ROWS, "0=8"
    ),
    "mixture of experts": Case(
        lambda: Net(experts, gate=linear(6, 4), e=nn.ModuleList(expert() for _ in range(4)), o=linear(8, 3)),
        ROWS,
        "e.0.0=12 e.1.0=12 e.2.0=12 e.3.0=12",
        {"gate": "'topk' depends on the order along it", "o#2": "its entries are picked by index"},
    ),
    "first of the units read by itself": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) * m.a(x)[:, 0:1], a=linear(), b=linear(8, 2)), ROWS, "a=7"
    ),
    "some of the units read by number": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) * m.a(x)[:, 5, None], a=linear(), b=linear(8, 2)),
        ROWS,
        "a=2",
        {"a#2": "the forward fixes a size that depends on it to the number 5 (getitem in the model)"},
    ),
    "halves by an attribute": Case(
        lambda: Net(
            lambda m, x: m.o(torch.cat([m.a(x)[:, : m.n // 2], m.m(m.a(x)[:, m.n // 2 :])], 1)),
            a=linear(6, 12),
            m=linear(6, 4),
            o=linear(10, 2),
            n=12,
        ),
        ROWS,
        "a=6 a#2=6 m=4",
    ),
    "written into zeros of a size from attributes": Case(
        lambda: Net(written, a=linear(6, 5), b=linear(6, 7), o=linear(12, 2), n=12, h=5), ROWS, "a=5 b=7"
    ),
    "modulation by another branch": Case(
        lambda: Net(
            film, f=linear(3, 16), c=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8, affine=False), o=nn.Conv2d(8, 3, 1)
        ),
        IMAGE,
        "f=8",
    ),
    "attention over pixels": Case(
        lambda: Net(
            nonlocal_block,
            c=nn.Conv2d(3, 8, 1),
            t=nn.Conv2d(8, 4, 1),
            p=nn.Conv2d(8, 4, 1),
            g=nn.Conv2d(8, 5, 1),
            w=nn.Conv2d(5, 8, 1),
            o=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "c=8 t:head_dim=4~ g:head_dim=5",
    ),
    "convolution along the channels": Case(
        lambda: Net(channel_convolution, c=nn.Conv2d(3, 8, 1), k=nn.Conv1d(1, 1, 3, padding=1), o=nn.Conv2d(8, 2, 1)),
        IMAGE,
        "",
        {"c": "a convolution slides along it"},
    ),
    "gate from the mean of the channels": Case(
        lambda: Net(spatial_gate, c=nn.Conv2d(3, 8, 1), k=nn.Conv2d(2, 1, 3, padding=1), o=nn.Conv2d(8, 2, 1)),
        IMAGE,
        "c=8~",
    ),
    "maximum over pieces": Case(
        lambda: Net(
            lambda m, x: m.o(m.a(x).view(x.shape[0], -1, m.p).max(-1)[0]), a=linear(6, 12), o=linear(4, 2), p=3
        ),
        ROWS,
        "a=4",
        {"a#2": "'max' looks for a position along it"},
    ),
    "half of the channels worked on": Case(
        lambda: Net(partial_stage, a=nn.Conv2d(3, 12, 1), m=nn.Conv2d(6, 5, 3, padding=1), o=nn.Conv2d(17, 2, 1)),
        IMAGE,
        "a=6 a#2=6 m=5",
    ),
    "an attribute that is also a number": Case(
        lambda: Net(lambda m, x: m.o(m.a(x).view(-1, m.n) / m.n), a=linear(6, 12), o=linear(12, 2), n=12),
        ROWS,
        "",
        {"a": "the forward computes a size that would no longer fit (div in the model)"},
    ),
    "running sums": Case(
        lambda: Net(lambda m, x: m.o(m.a(x).cumsum(-1)), a=linear(), o=linear(8, 2)),
        ROWS,
        "",
        {"a": "'cumsum' depends on the order along it"},
    ),
    "recurrent cells": Case(
        lambda: Net(lambda m, x: m.o(m.c(x)[0] + m.d(x)), c=nn.LSTMCell(6, 8), d=nn.GRUCell(6, 8), o=linear(8, 2)),
        ROWS,
        "c:hidden=8",
    ),
    "outer product of two layers": Case(
        lambda: Net(
            lambda m, x: m.o((m.a(x).unsqueeze(2) * m.b(x).unsqueeze(1)).flatten(1)),
            a=linear(6, 4),
            b=linear(6, 3),
            o=linear(12, 2),
        ),
        ROWS,
        "a=4 b=3",
    ),
    "outer product of a layer with itself": Case(
        lambda: Net(
            lambda m, x: m.o((m.a(x).unsqueeze(2) * m.a(x).unsqueeze(1)).flatten(1)), a=linear(6, 4), o=linear(16, 2)
        ),
        ROWS,
        "",
        {"a": "it occurs twice in one axis"},
    ),
    "depthwise after concatenation": Case(
        lambda: Net(
            lambda m, x: m.o(m.d(torch.cat([m.a(x), m.b(x)], 1))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 6, 1),
            d=nn.Conv2d(10, 10, 3, groups=10),
            o=nn.Conv2d(10, 2, 1),
        ),
        IMAGE,
        "a=4 b=6",
    ),
    "groups across a concatenation": Case(
        lambda: Net(
            lambda m, x: m.o(m.d(torch.cat([m.a(x), m.b(x)], 1))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 8, 1),
            d=nn.Conv2d(12, 12, 3, groups=2),
            o=nn.Conv2d(12, 2, 1),
        ),
        IMAGE,
        "",
        {"a": "the groups of a convolution cut across its structure"},
    ),
    "repetition": Case(lambda: Net(lambda m, x: m.o(m.a(x).repeat(1, 2)), a=linear(6, 4), o=linear(8, 2)), ROWS, "a=4"),
    "shortcut padded to a width computed": Case(
        lambda: Net(pad_to_width, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 8, 1), o=nn.Conv2d(8, 2, 1), n=8),
        IMAGE,
        "a=6 b=5",
    ),
    "complex pairs": Case(lambda: Net(rotated, a=linear(6, 12), o=linear(12, 2)), ROWS, "a=6"),
    "queries that are parameters": Case(
        lambda: Net(latents, z=parameter(5, 6), q=linear(), k=linear(), v=linear(6, 7), o=linear(7, 2)),
        (2, 4, 6),
        "k=8 v:head_dim=7",  # no data pass q, which is tied to k
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    x = torch.randn(case.shape)
    found = trace(model, lambda m: m(x))
    free = [g for g in found.groups if g.frozen is None]
    assert " ".join(f"{g.name}={g.units}{'~' if g.exact else ''}" for g in free) == case.free
    for group, reason in case.frozen.items():
        assert found.group(group).frozen == reason
    tied: dict[str, list[Group]] = {}
    for group in free:
        tied.setdefault(group.tied_count or group.name, []).append(group)
    for groups in tied.values():
        for count in (1, max(1, round(0.7 * groups[0].units))):
            rng = random.Random(count)
            keep = {g.name: sorted(rng.sample(range(g.units), count)) for g in groups}
            cut = copy.deepcopy(model)
            apply(cut, [plan_resize(found, keep)])
            check = check_cut(model, cut, found, keep, lambda m: m(x))
            assert check.ran, check.reason
            assert check.exact or any(g.exact for g in groups), check
