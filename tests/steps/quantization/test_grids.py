"""Formats as grids: what a solver rounds to is what is stored, of every format there is."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import gracile.formats as formats
from gracile.formats import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    FixedPoint,
    Format,
    Int,
    MidRise,
    PerChannel,
    PerGroup,
    PerTensor,
    PowersOfTwo,
    Ternary,
)
from gracile.ranges import MSE
from gracile.solvers import GPTQ, AdaRound, RoundingProblem
from gracile.steps.quantization.grids import FormatGrid, IntGrid, LevelGrid, MXFP4Grid, NVFP4Grid, grid_of
from tests.solvers.rounding_problems import layer

FORMATS: list[Format] = [
    Int(3),
    Int(4, PerGroup(16), symmetric=False),
    Int(8, PerTensor()),
    MidRise(2),
    NF4(PerGroup(16)),
    FP4(PerTensor()),
    PowersOfTwo(),
    Ternary(),
    Binary(),
    FP8(),
    FP8("e5m2", PerTensor()),
    MXFP4(),
    NVFP4(),
    FixedPoint(4),
    FixedPoint(10),
    Codebook(3),
    Codebook(1),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def grid_for(fmt: Format, weight: Tensor) -> FormatGrid:
    return grid_of(fmt, MSE(), fmt.encode(weight))


def near_grid_points(fmt: Format, weight: Tensor) -> list[Tensor]:
    """For each weight the numbers around it that the format could store there, with the present scales."""
    tensors = fmt.encode(weight)
    given = {k: v for k, v in tensors.items() if k not in ("codes", "shape")}
    reach = 1.5 * float(weight.abs().max())
    found = []
    small = torch.logspace(-4, 0, 500)
    for value in torch.cat([torch.linspace(-reach, reach, 801), small, -small]):
        found.append(fmt.decode(fmt.encode(torch.full_like(weight, float(value)), **given)))
    return [column.unique() for column in torch.stack(found).flatten(1).T]


def test_every_format_is_here() -> None:
    classes = [getattr(formats, name) for name in formats.__all__]
    members = {c for c in classes if inspect.isclass(c) and issubclass(c, Format) and not inspect.isabstract(c)}
    assert members == {type(fmt) for fmt in FORMATS}


@each_format
def test_units_are_the_nearest_points_and_the_next_on_the_other_side(fmt: Format) -> None:
    weight = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)) * 0.7
    tensors, grid = fmt.encode(weight), grid_for(fmt, weight)

    def wide(values: Tensor) -> Tensor:
        return (values.expand(2, 1) if grid.shared else values.reshape(2, -1)).repeat_interleave(grid.group or 20, 1)

    scale = wide(grid.stored_scale(tensors))[:, :20]
    zero = wide(tensors["zero_point"].float())[:, :20] if "zero_point" in tensors else torch.zeros_like(scale)
    unit = grid.units(weight, scale, zero)
    here = unit * scale
    assert torch.allclose(here, fmt.decode(tensors), atol=1e-6)
    other = grid.second(weight, scale, zero, unit) * scale
    for x, at, beyond, points in zip(
        weight.flatten(), here.flatten(), other.flatten(), near_grid_points(fmt, weight), strict=True
    ):
        if abs(float(at - x)) < 1e-6:  # on the grid: no side is the other one
            continue
        across = points[(points > x) != (at > x)]
        expected = across[(across - x).abs().argmin()] if len(across) else at
        assert float(beyond) == pytest.approx(float(expected), abs=1e-5)


@each_format
@pytest.mark.parametrize("solver", [GPTQ(), AdaRound(iterations=30, learning_rate=0.1)], ids=["GPTQ", "AdaRound"])
def test_what_a_solver_gives_is_stored_exactly(fmt: Format, solver: GPTQ | AdaRound) -> None:
    weight, problem = layer(4, 6, 48)
    grid = grid_for(fmt, weight).fitted(weight, problem)
    found = solver(weight, problem, grid)
    assert float(found.loss.sum()) < float(found.nearest_loss.sum())
    tensors = grid.encode_rows(found.weight, found.scale, found.zero, (6, 12, 2, 2))
    decoded = fmt.decode(tensors)
    assert decoded.shape == (6, 12, 2, 2)
    assert torch.allclose(decoded.flatten(1).double(), found.weight, rtol=1e-6, atol=1e-9)


@each_format
def test_pruned_weights_stay_zero(fmt: Format) -> None:
    if isinstance(fmt, (Binary, MidRise)):  # have no zero, and are refused
        return
    weight, problem = layer(5, 6, 32)
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = weight.masked_fill(zeros, 0.0)
    problem = RoundingProblem(problem.target, problem.metric, zeros)
    grid = grid_for(fmt, weight).fitted(weight, problem)
    found = GPTQ()(weight, problem, grid)
    assert bool((fmt.decode(grid.encode_rows(found.weight, found.scale, found.zero, (6, 32)))[zeros] == 0).all())


@pytest.mark.parametrize(
    ("grid", "scales"),
    [
        (MXFP4Grid(MXFP4()), 2.0 ** torch.arange(-127, 128, dtype=torch.float64)),
        (
            NVFP4Grid(NVFP4(), torch.tensor(0.37)),
            torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * float(torch.tensor(0.37)),
        ),
    ],
    ids=["MXFP4", "NVFP4"],
)
def test_scales_of_few_bits_are_the_nearest_of_all(grid: FormatGrid, scales: Tensor) -> None:
    wanted = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(4).exp()
    stored = grid.stored(wanted)
    best = (scales - wanted[:, None]).abs().amin(1)
    assert bool(((stored - wanted).abs() <= best + 1e-6 * wanted).all())  # scales are rounded to float32
    assert torch.equal(grid.stored(stored), stored)
    ends = grid.stored(torch.tensor([1e-60, 1e60], dtype=torch.float64))
    assert torch.allclose(ends, torch.stack([scales.min(), scales.max()]), rtol=1e-6)


def test_levels_of_a_codebook_are_fitted_to_the_metric_and_then_to_the_codes() -> None:
    weight, problem = layer(6, 8, 24)
    plain = grid_for(Codebook(2), weight)
    weighted = plain.fitted(weight, problem)
    importance = problem.metric.diagonal()

    def error(grid: FormatGrid) -> float:
        one = torch.ones(8, dtype=torch.float64)
        rounded = grid.units(weight, one.unsqueeze(1), one.unsqueeze(1))
        return float(((rounded - weight).square() * importance).sum())

    assert error(weighted) < error(plain)
    found = GPTQ()(weight, problem, weighted)
    better = weighted.refitted(found.weight, problem)
    assert better is not None
    grid, moved = better
    one = torch.ones(8, 1, dtype=torch.float64)
    assert torch.equal(grid.units(moved, one, one), moved)
    assert all(len(w[found.weight == v].unique()) == 1 for w in (moved,) for v in found.weight.unique())  # same codes
    assert float(problem.loss(moved).sum()) < float(found.loss.sum())
    assert grid_for(Codebook(6), weight).refitted(found.weight, problem) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(5)], ids=str)
def test_the_grid_of_a_solver_is_the_grid_of_the_format(granularity: object, symmetric: bool) -> None:
    fmt = Int(3, granularity, symmetric=symmetric)  # type: ignore[arg-type]
    grid = IntGrid(fmt, MSE())
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    size = grid.group or 12
    parts, counts = weight.split(size, -1), torch.ones(12).split(size)
    fitted = [grid.fit(part, count) for part, count in zip(parts, counts)]
    values = [
        scale.unsqueeze(-1) * grid.units(part, scale.unsqueeze(-1), zero.unsqueeze(-1))
        for part, (scale, zero) in zip(parts, fitted)
    ]
    assert torch.allclose(torch.cat(values, -1), fmt.decode(fmt.encode(weight, MSE().weight(weight, fmt))), atol=1e-6)
    scale, zero = fitted[0]
    unit = grid.units(parts[0][:, 0], scale, zero)
    other = grid.second(parts[0][:, 0], scale, zero, unit)
    for i in range(6):
        levels = torch.arange(fmt.qmin, fmt.qmax + 1) - zero[i]
        distances = (levels * scale[i] - parts[0][i, 0]).abs()
        assert float(unit[i]) == float(levels[distances.argmin()])
        if float(unit[i] * scale[i]) == float(parts[0][i, 0]):  # on the grid: no side is the other one
            continue
        beyond = levels[(levels - parts[0][i, 0] / scale[i]).sign() != (unit[i] - parts[0][i, 0] / scale[i]).sign()]
        assert float(other[i]) == (float(beyond[(beyond - unit[i]).abs().argmin()]) if len(beyond) else float(unit[i]))


@pytest.mark.parametrize("fmt", [NF4(PerChannel(0)), FP4(PerTensor()), Ternary()], ids=str)
def test_a_table_of_levels_is_a_grid_too(fmt: object) -> None:
    grid = LevelGrid(fmt)  # type: ignore[arg-type]
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scale, zero = grid.fit(weight, torch.ones(12, dtype=torch.float64))
    values = scale.unsqueeze(-1) * grid.units(weight, scale.unsqueeze(-1), zero.unsqueeze(-1))
    stored = fmt.decode(fmt.encode(weight, scale[0] if grid.shared else scale))  # type: ignore[attr-defined]
    assert torch.allclose(values.float(), stored, atol=1e-6)
    levels = torch.tensor(sorted(set(fmt.levels)), dtype=torch.float64)  # type: ignore[attr-defined]
    unit = grid.units(weight[:, 0], scale, zero)
    other = grid.second(weight[:, 0], scale, zero, unit)
    for i in range(5):
        x = float(weight[i, 0] / scale[i])
        beyond = [level for level in levels.tolist() if (level > x) != (float(unit[i]) > x)]
        assert float(other[i]) == (min(beyond, key=lambda level: abs(level - x)) if beyond else float(unit[i]))
