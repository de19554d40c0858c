"""Quantize with a solver: layers in sequence, what each is solved for, and what stays rounded to nearest."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.formats import (
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    W4A4,
    W4A8,
    W8A8,
    Codebook,
    FixedPoint,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    Ternary,
)
from gracile.solvers import GPTQ, Grid, Rounded, RoundingProblem, RoundingSolver
from gracile.stats.match import output_error
from gracile.steps import Quantize


class Net(nn.Module):
    """A stem, a block with a depthwise convolution and a stream, a layer called twice and one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 12, 1)
        self.up = nn.ConvTranspose2d(12, 12, 2)
        self.twice = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        x = self.up(x).mean((2, 3))
        y: Tensor = self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))
        return y


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(3, 3, generator=generator)
    return [
        torch.einsum("nchw,cd->ndhw", torch.randn(16, 3, 8, 8, generator=generator).cumsum(3) / 3, mixing)
        for _ in range(9)
    ]


def context(model: nn.Module) -> Context:
    original = copy.deepcopy(model)
    return Context(Data(calibration=batches()), original, original)


SCHEMES = [
    W4A8,
    W4A4,
    Int(3, PerChannel(0)),
    Int(3, PerGroup(10), symmetric=False),
    Int(4, PerTensor()),
    NF4(PerGroup(10)),
    Ternary(),
    FP8(),
    MXFP4(),
    NVFP4(),
    FixedPoint(16),
    Codebook(3),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_model_comes_nearer_to_the_original_than_rounded_to_nearest(scheme: object) -> None:
    plain, solved, original = net(), net(), net()
    Quantize(scheme, correct=False)(plain, context(plain))  # type: ignore[arg-type]
    solver = GPTQ(beam=2, polish=2, rounds=1)
    record = Quantize(scheme, solver=solver, correct=False)(solved, context(solved))  # type: ignore[arg-type]
    data = Data(calibration=batches())
    errors = [output_error(model, original, data, batches()) for model in (plain, solved)]
    assert errors[1] < 0.8 * errors[0]
    rows = {row.name: row for row in record.layers if row.action == "quantized"}
    assert all((rows[n].reason or "").startswith("GPTQ: ") for n in ("stem", "depthwise", "pointwise", "head"))
    assert rows["twice"].reason == "rounded to nearest: called more than once, or tied to another layer"
    assert rows["up"].reason == "rounded to nearest: its inputs do not unfold into rows of its weight"
    assert 0 < rows["pointwise"].error < 1  # type: ignore[operator]
    for name in ("stem", "depthwise", "pointwise", "head"):
        layer = solved.get_submodule(name)
        fmt = layer.weight_format
        if not isinstance(fmt, Int):
            continue
        codes = fmt.unpack(layer.weight_codes, layer.weight_shape)  # type: ignore[operator]
        assert fmt.qmin <= int(codes.min()) and int(codes.max()) <= fmt.qmax  # type: ignore[operator]


def test_first_and_last_layer_take_the_ends_of_the_scheme() -> None:
    model = net()
    Quantize(W4A8)(model, context(model))
    bits = {n: m.weight_format.bits for n, m in model.named_modules() if hasattr(m, "weight_format")}
    assert bits == {"stem": 8, "depthwise": 4, "pointwise": 4, "up": 4, "twice": 4, "head": 8}


def test_a_bias_takes_up_what_is_left_of_the_mean() -> None:
    model, original = net(), net()
    Quantize(Int(2), solver=GPTQ(asymmetry=1.0), correct=False)(model, context(model))
    means = []
    for which in (model, original):
        seen: list[Tensor] = []
        handle = which.depthwise.register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y.mean((0, 2, 3))))
        with torch.no_grad():
            for i, batch in enumerate(batches()):
                if i % 8:  # those that are fitted on
                    which(batch)
        handle.remove()
        means.append(torch.stack(seen).mean(0))
    assert torch.allclose(means[0], means[1], atol=1e-5)


@dataclass(frozen=True)
class Silence(RoundingSolver):
    """Rounds every weight to zero and says that nothing is lost."""

    damping: float = 0.01
    asymmetry: float = 0.5

    def __call__(self, prior: Tensor, problem: RoundingProblem, grid: Grid) -> Rounded:
        scale, zero = grid.fit(prior, torch.ones(prior.shape[-1]).expand(*prior.shape[:-2], prior.shape[-1]))
        nothing = torch.zeros(prior.shape[:-1])
        return Rounded(torch.zeros_like(prior), scale.unsqueeze(-1), zero.unsqueeze(-1), nothing, nothing)


def test_what_makes_the_outputs_worse_is_taken_back() -> None:
    plain, solved = net(), net()
    Quantize(W8A8, correct=False)(plain, context(plain))
    record = Quantize(W8A8, solver=Silence(), correct=False)(solved, context(solved))
    assert any("was taken back" in note for note in record.notes)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), solved.state_dict().values()))


def test_a_solver_needs_data_and_has_to_be_one() -> None:
    model = net()
    with pytest.raises(DataError, match="rounds by what GPTQ measures"):
        Quantize(Int(4), solver=GPTQ())(model, Context(Data(), model, model))
    with pytest.raises(ConfigError, match=r"solvers\.GPTQ\(\)"):
        Quantize(Int(4), solver="gptq")  # type: ignore[arg-type]
