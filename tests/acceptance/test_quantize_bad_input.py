"""Quantization of what should not be, by every solver: it works and stays finite, or says which layer and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.errors import DataError, ModelError, NothingChangedError
from gracile.formats import PerGroup

SOLVERS = {
    "nearest": None,
    "GPTQ": gc.solvers.GPTQ(),
    "AdaRound": gc.solvers.AdaRound(iterations=3),
}
SCHEMES = {
    "W8A8": gc.W8A8,
    "W2A2": gc.formats.W2A2,
    "int3 by group": gc.Int(3, PerGroup(4), symmetric=False),
}
#: Every scheme and every solver once; `make test-all` runs them all together.
QUICK = {("W8A8", "nearest"), ("W8A8", "GPTQ"), ("W2A2", "AdaRound"), ("int3 by group", "GPTQ")}
each_way = pytest.mark.parametrize(
    ("scheme", "solver"),
    [
        pytest.param(
            SCHEMES[scheme],
            SOLVERS[solver],
            id=f"{scheme}, {solver}",
            marks=() if (scheme, solver) in QUICK else pytest.mark.slow,
        )
        for scheme in SCHEMES
        for solver in SOLVERS
    ],
)


def net() -> nn.Sequential:
    """Odd sizes throughout, so that no row or group fills its bytes."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, groups=5),
        nn.Flatten(),
        nn.Linear(45, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    ).eval()


def images(count: int = 16, size: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 3, 7, 7).split(size))


def quantized(model: nn.Module, scheme: Any, solver: Any, data: list[Tensor]) -> gc.Result:
    return gc.compress(model, gc.Quantize(scheme, solver=solver), gc.Data(calibration=data), seed=0)


def check(model: nn.Module, result: gc.Result, folder: Path) -> None:
    """Finite outputs on ordinary data, and the same to the bit after a reload."""
    x = torch.randn(4, 3, 7, 7)
    with torch.no_grad():
        y = result.model(x)
        assert torch.isfinite(y).all()
        path = result.save(folder / "saved")
        assert torch.equal(gc.load(path, net())(x), y)


@each_way
@pytest.mark.parametrize(
    "data",
    [
        pytest.param([torch.full((4, 3, 7, 7), 0.7)] * 3, id="constant"),
        pytest.param([torch.zeros(4, 3, 7, 7)] * 3, id="zeros"),
        pytest.param([torch.linspace(-1, 1, 147).view(1, 3, 7, 7)], id="one sample"),
        pytest.param([torch.linspace(-1, 1, 441).view(3, 3, 7, 7)] * 2, id="three samples, fewer than inputs"),
    ],
)
def test_calibration_that_says_little_is_enough(scheme: Any, solver: Any, data: list[Tensor], tmp_path: Path) -> None:
    model = net()
    check(model, quantized(model, scheme, solver, data), tmp_path)


def zero_rows(model: nn.Module) -> None:
    model[3].weight[1] = 0  # type: ignore[index,operator]
    model[5].weight[2] = 0  # type: ignore[index,operator]
    model[5].weight[:, 8:12] = 0  # type: ignore[index,operator]


def zero_layer(model: nn.Module) -> None:
    model[5].weight.zero_()  # type: ignore[index,operator,union-attr]


def tiny(model: nn.Module) -> None:
    model[5].weight.mul_(1e-30)  # type: ignore[index,operator,union-attr]


def huge(model: nn.Module) -> None:  # beyond what half precision holds
    model[5].weight.mul_(1e12)  # type: ignore[index,operator,union-attr]
    model[7].weight.mul_(1e-10)  # type: ignore[index,operator,union-attr]


def mixed_sizes(model: nn.Module) -> None:
    model[5].weight[0] *= 1e8  # type: ignore[index,operator]
    model[5].weight[1] *= 1e-8  # type: ignore[index,operator]


@each_way
@pytest.mark.parametrize("damage", [zero_rows, zero_layer, tiny, huge, mixed_sizes])
def test_weights_of_any_size_are_encoded(scheme: Any, solver: Any, damage: Any, tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        damage(model)
    result = quantized(model, scheme, solver, images())
    check(model, result, tmp_path)
    if damage is zero_rows:
        assert not result.model[5].weight[2].any()  # type: ignore[index]
        assert not result.model[3].weight[1].any()  # type: ignore[index]


@each_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_named(scheme: Any, solver: Any, bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[5].weight[0, 0] = bad  # type: ignore[index,operator]
    with pytest.raises(ModelError, match=r"'5\.weight' holds NaN or infinity"):
        quantized(model, scheme, solver, images())


@each_way
def test_damaged_calibration_is_named(scheme: Any, solver: Any) -> None:
    data = images()
    data[1][0, 0, 0, 0] = float("nan")
    if solver is None and isinstance(scheme, gc.Int):  # reads no inputs; its correction of biases is taken back
        assert torch.isfinite(quantized(net(), scheme, solver, data).model(torch.randn(4, 3, 7, 7))).all()
        return
    with pytest.raises(DataError, match=r"NaN|not finite"):
        quantized(net(), scheme, solver, data)


@each_way
def test_what_is_quantized_already_is_said_to_be(scheme: Any, solver: Any) -> None:
    once = quantized(net(), gc.W8A8, None, images()).model
    with pytest.raises(NothingChangedError, match="quantized already"):
        quantized(once, scheme, solver, images())


@pytest.mark.parametrize("solver", [gc.solvers.GPTQ(), gc.solvers.AdaRound(iterations=3)], ids=["GPTQ", "AdaRound"])
def test_a_factor_that_fails_is_damped_and_said(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.linalg.cholesky_ex
    calls = 0

    def fails_twice(a: Tensor) -> Any:
        nonlocal calls
        root, failed = whole(a)
        calls += 1
        return root, torch.ones_like(failed) if calls < 3 else failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_twice)
    rows = {row.name: row for row in quantized(net(), gc.Int(3), solver, images(128, 16)).report.steps[0].layers}
    first = rows["0"].reason
    assert first is not None and "damped 100 times as much" in first
    assert not any("damped" in (rows[name].reason or "") for name in ("3", "5", "7"))
