"""Blocks reconstructed by AdaRound and SignRound: gains, what is left alone, and what is put back."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.formats import PerChannel, PerTensor
from gracile.steps.quantization.block_calls import Call

W3A4 = gc.Scheme("W3A4", gc.Int(3, PerChannel(0)), gc.Int(4, PerTensor(), symmetric=False))
START = gc.solvers.GPTQ(beam=1, rounds=1, polish=0, asymmetry=0.0)
QUICK = gc.solvers.AdaRound(iterations=250, learning_rate=2e-2, start=START)
SIGNS = gc.solvers.SignRound(iterations=250, learning_rate=4e-3, start=START)
each_solver = pytest.mark.parametrize("solver", [QUICK, SIGNS], ids=["AdaRound", "SignRound"])


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return torch.relu(x + gain * self.second(torch.relu(self.first(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(seed: int, count: int = 24) -> list[Tensor]:
    """Of noise, and so many that what is learned from them holds for others, whatever the processor rounds."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(count)]


@cache
def started() -> gc.Result:
    """Rounded by the solver that QUICK starts from."""
    return rounded(START)


@cache
def reconstructed(solver: gc.solvers.BlockSolver = QUICK) -> gc.Result:
    return rounded(solver)


def rounded(solver: object, model: nn.Module | None = None, scheme: gc.Scheme = W3A4) -> gc.Result:
    step = gc.Quantize(scheme, solver=solver, correct=False)  # type: ignore[arg-type]
    return gc.compress(net() if model is None else model, step, gc.Data(calibration=batches(1)))


def error(model: nn.Module, original: nn.Module) -> float:
    x = torch.cat(batches(9))
    with torch.no_grad():
        return float((model(x) - original(x)).square().sum() / original(x).square().sum())


@each_solver
def test_blocks_come_nearer_to_what_they_gave(solver: gc.solvers.BlockSolver) -> None:
    original, start, found = net(), started(), reconstructed(solver)
    assert error(found.model, original) < 0.96 * error(start.model, original)
    record = found.report.steps[0]
    assert record.numbers["output_error_reconstructed"] < record.numbers["output_error_before_reconstruction"]
    rows = {row.name: row for row in record.layers if row.action == "reconstructed"}
    assert rows and set(rows) <= {"stem", "blocks.0", "blocks.1", "head"}
    assert rows.keys() & {"blocks.0", "blocks.1"}
    assert any(f"{type(solver).__name__} reconstructed 4 blocks" in note for note in record.notes)


@each_solver
def test_codes_move_to_a_neighbour_at_most_and_scales_of_weights_not(solver: gc.solvers.BlockSolver) -> None:
    start, found = started().model, reconstructed(solver).model
    moved = 0.0
    for name in ("blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second"):
        a, b = start.get_submodule(name), found.get_submodule(name)
        assert torch.equal(a.weight_scale, b.weight_scale)
        steps = ((a.decoded_weight() - b.decoded_weight()) / a.weight_scale.view(-1, 1, 1, 1)).abs()
        assert float(steps.max()) < 1.001
        moved += float(steps.sum())
        assert b.rounding is None and b.drop == 0 and not b.trains
    assert moved > 0


@each_solver
def test_pruned_weights_stay_zero(solver: gc.solvers.BlockSolver) -> None:
    model = net()
    kernel = model.blocks[0].first.weight
    zeros = torch.rand(kernel.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    kernel.data.masked_fill_(zeros, 0.0)
    found = rounded(solver, model).model
    assert not bool(found.get_submodule("blocks.0.first").decoded_weight()[zeros].any())


@pytest.mark.parametrize("fmt", [gc.formats.Codebook(2), gc.formats.MXFP4(), gc.formats.FixedPoint(16)], ids=str)
def test_formats_without_free_scales_have_neighbours_too(fmt: gc.formats.Format) -> None:
    scheme = gc.Scheme("other", fmt, gc.W8A8.input)
    original, start, found = net(), rounded(START, scheme=scheme), rounded(QUICK, scheme=scheme)
    assert error(found.model, original) < error(start.model, original)
    assert [row for row in found.report.steps[0].layers if row.action == "reconstructed"]


def test_what_gains_nothing_is_put_back() -> None:
    """A learning rate too small to change a code: all is as the start left it, scales of inputs too."""
    start = started().model
    result = rounded(replace(QUICK, iterations=1, learning_rate=1e-12))
    state = result.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start.state_dict().items())
    assert not [row for row in result.report.steps[0].layers if row.action == "reconstructed"]
    assert any("was taken back on 4 blocks" in note for note in result.report.steps[0].notes)


@each_solver
def test_it_starts_from_nearest_where_no_other_start_is_given(solver: gc.solvers.BlockSolver) -> None:
    original = net()
    nearest, found = rounded(None), rounded(replace(solver, start=None))
    assert error(found.model, original) < 0.8 * error(nearest.model, original)


def test_the_same_seed_gives_the_same_codes() -> None:
    first, second = reconstructed().model.state_dict(), rounded(QUICK).model.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_examples_are_drawn_together_and_mixed_with_the_original(drop: float) -> None:
    torch.manual_seed(0)
    x, other = torch.arange(40.0).view(8, 5), -torch.arange(40.0).view(8, 5)
    mask, shared = torch.arange(8), torch.ones(3, 3)
    call = Call(((x, mask, shared), {"scale": 2.0}), ((other, mask, shared), {"scale": 2.0}), x * 10)
    (args, kwargs), target = call.part(call.rows(4), drop)
    assert kwargs == {"scale": 2.0} and torch.equal(args[2], shared) and args[2] is not shared
    assert len(args[0]) == len(args[1]) == len(target) == 4
    assert torch.equal(args[0].abs(), x[args[1]]) and torch.equal(target, 10 * x[args[1]])
    assert bool((args[0] < 0).any()) == (drop > 0) and bool((args[0] > 0).any())


class Mixing(nn.Module):
    """Tokens [n, n, d] whose first two axes are alike, mixed along the first."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_blocks_that_mix_their_examples_get_all_of_them() -> None:
    x = torch.randn(4, 4, 3)
    call = Call(((x,), {}), ((x,), {}), x)
    assert call.divides(nn.Identity()) and not call.divides(Mixing())
    matrix = torch.randn(4, 4)
    assert not Call(((x, matrix), {}), ((x, matrix), {}), x).divides(Times())


class Times(nn.Module):
    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("ij,njd->nid", matrix, x)


def test_a_block_that_other_tokens_come_to_is_left_as_it_is() -> None:
    class Routed(nn.Module):
        """The head reads the examples whose first feature is positive, which rounding changes."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            chosen = x[:, 0] > 0
            return x.index_put((chosen.nonzero().squeeze(1),), self.expert(x[chosen]))

    torch.manual_seed(0)
    batches = [torch.randn(64, 6) for _ in range(4)]
    step = gc.Quantize(gc.Int(2), solver=replace(QUICK, start=None, iterations=20), correct=False)
    result = gc.compress(Routed().eval(), step, gc.Data(calibration=batches))
    rows = [row.name for row in result.report.steps[0].layers if row.action == "reconstructed"]
    assert "expert" not in rows
    assert any("2 blocks" in note for note in result.report.steps[0].notes)
