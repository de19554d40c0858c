"""What every target must satisfy. A new target joins by one row of MEMBERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.errors import ConfigError, DataError, GracileError, TargetError
from gracile.formats import Int, PerTensor, format_to_config
from gracile.nn import quantize_layer
from gracile.targets import OnnxRuntime, OpenVINO, PyTorch, Target


@dataclass(frozen=True)
class Member:
    target: Target
    error: float = 1e-5  # of float32 models, as a share of the largest output: sums in another order
    integer_error: float = 0.02  # of int8 models: a code that flips at its edge is one step of 1/255 of a range


MEMBERS = [
    Member(OnnxRuntime(threads=1)),
    Member(OnnxRuntime(threads=1, precision="default")),
    Member(OpenVINO(threads=1)),
    Member(OpenVINO(threads=1, precision="default"), error=0.02, integer_error=0.05),  # bf16 has 8 bits of mantissa
    Member(PyTorch(threads=1), integer_error=1e-5),
]

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(m.target))


@pytest.fixture(autouse=True)
def _present(request: pytest.FixtureRequest) -> None:
    member = request.node.callspec.params.get("member") if hasattr(request.node, "callspec") else None
    if member is not None and member.target.available() is not None:
        pytest.skip(member.target.available())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head((x + x.flip(1)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.gru = nn.GRU(6, 8, batch_first=True)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        states, last = self.gru(self.embed(ids))
        return {"last_hidden_state": states * scale[:, None, None], "pooled": last[-1]}


def convolutions() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Convolutions().eval(), torch.randn(6, 3, 8, 8)


def recurrent() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Recurrent().eval(), {"ids": torch.randint(0, 20, (6, 5)), "scale": torch.rand(6)}


def quantized() -> tuple[nn.Module, Any]:
    model, x = convolutions()
    model.norm = nn.Identity()
    activation = Int(8, PerTensor(), symmetric=False)
    config = {"weight": format_to_config(Int(8)), "input": format_to_config(activation)}
    low_high = {"conv": (x.min(), x.max()), "head": (torch.tensor(0.0), torch.tensor(3.0))}
    for name, (low, high) in low_high.items():
        layer = model.get_submodule(name)
        scale, zero_point = activation.scale_of(low, high)
        tensors = {f"weight_{key}": value for key, value in Int(8).encode(layer.weight).items()}
        assert zero_point is not None
        setattr(
            model,
            name,
            quantize_layer(layer, {**tensors, "input_scale": scale, "input_zero_point": zero_point}, config),
        )
    return model, x


def call(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def largest_error(found: Any, expected: Any) -> float:
    if isinstance(expected, Tensor):
        return float((found - expected).abs().max() / expected.abs().max())
    assert list(found) == list(expected)
    return max(largest_error(found[name], expected[name]) for name in expected)


@each_member
@pytest.mark.parametrize("build", [convolutions, recurrent, quantized])
def test_exports_and_runs_with_parity_at_any_batch_size(
    member: Member, build: Callable[[], tuple[nn.Module, Any]], tmp_path: Path
) -> None:
    model, batch = build()
    path = member.target.export(model, batch, tmp_path / f"model{member.target.suffix}")
    assert path.is_file()
    assert list(tmp_path.iterdir()) == [path]
    run = member.target.load(path)
    bound = member.integer_error if build is quantized else member.error
    for size in (6, 1, 4):
        part = {k: v[:size] for k, v in batch.items()} if isinstance(batch, dict) else batch[:size]
        assert largest_error(run(part), call(model, part)) <= bound


@each_member
def test_batch_norms_in_evaluation_mode_whatever_mode_the_model_is_in(member: Member, tmp_path: Path) -> None:
    model, x = convolutions()
    path = member.target.export(model.train(), x, tmp_path / f"model{member.target.suffix}")
    assert largest_error(member.target.run(path, x), call(model.eval(), x)) <= member.error


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


@each_member
def test_what_cannot_be_traced_gives_a_reason_and_no_file(member: Member, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"Untraceable cannot be (exported|traced)[^:]*: \S+"):
        member.target.export(Untraceable(), torch.ones(3, 4), tmp_path / f"model{member.target.suffix}")
    assert list(tmp_path.iterdir()) == []


@each_member
def test_damaged_and_absent_files_are_refused(member: Member, tmp_path: Path) -> None:
    path = tmp_path / f"model{member.target.suffix}"
    with pytest.raises(TargetError, match="cannot load"):
        member.target.load(path)
    path.write_bytes(b"this is no model")
    with pytest.raises(TargetError, match="cannot load"):
        member.target.load(path)


@each_member
def test_a_batch_without_an_input_is_refused_by_name(member: Member, tmp_path: Path) -> None:
    model, batch = recurrent()
    run = member.target.load(member.target.export(model, batch, tmp_path / f"model{member.target.suffix}"))
    with pytest.raises(DataError, match="has no scale"):
        run({"ids": batch["ids"]})
    with pytest.raises(GracileError):
        run({"ids": batch["ids"][:, :, None].repeat(1, 1, 2), "scale": batch["scale"]})


@each_member
def test_settings_are_checked(member: Member) -> None:
    for threads in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="threads"):
            replace(member.target, threads=threads)
    if hasattr(member.target, "precision"):
        with pytest.raises(ConfigError, match="precision='f16'"):
            replace(member.target, precision="f16")
        assert member.target.precision in member.target.capabilities.precisions
