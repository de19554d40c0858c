"""A step of a solver that is stopped goes on behind its last finished layer, and ends with the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Progress
from gracile.steps.quantization import reconstruct_blocks, round_layers
from gracile.steps.quantization.finished_parts import FinishedParts

SOLVER = gc.solvers.AdaRound(iterations=5, start=gc.solvers.GPTQ(rounds=1, beam=1))


class Stopped(Exception):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.Flatten(), nn.Linear(64, 5)).eval()


def compress(place: Path, stop_at: tuple[str, int] | None = None, scheme: gc.Scheme = gc.W4A8) -> gc.Result:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(4)]

    def on_progress(progress: Progress) -> None:
        if stop_at is not None and (progress.phase, progress.done) == stop_at:
            raise Stopped

    step = gc.Quantize(scheme, solver=SOLVER)
    return gc.compress(net(), step, gc.Data(calibration=batches), run_dir=place, on_progress=on_progress)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers and blocks that were solved, in order."""
    names: list[str] = []
    one, block = round_layers._numbers, reconstruct_blocks._reconstruct

    def rounded(moments: Any, name: str, *args: Any) -> Any:
        names.append(name)
        return one(moments, name, *args)

    def reconstructed(calls: Any, *args: Any) -> Any:
        names.append(f"block {calls.block}")
        return block(calls, *args)

    monkeypatch.setattr(round_layers, "_numbers", rounded)
    monkeypatch.setattr(reconstruct_blocks, "_reconstruct", reconstructed)
    return names


@pytest.mark.parametrize("scheme", [gc.W4A8, gc.Scheme("W4", gc.Int(4))], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("stop_at", [("round", 2), ("round", 4), ("reconstruct", 3)])
def test_it_goes_on_behind_the_last_finished_part(
    stop_at: tuple[str, int], scheme: gc.Scheme, worked: list[str], tmp_path: Path
) -> None:
    whole = compress(tmp_path / "whole", scheme=scheme)
    everything, worked[:] = list(worked), []
    with pytest.raises(Stopped):
        compress(tmp_path / "stopped", stop_at, scheme)
    result = compress(tmp_path / "stopped", scheme=scheme)
    assert worked == everything  # each once, before the stop or behind it
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    records = [run.report.steps[0] for run in (whole, result)]
    assert records[0].layers == records[1].layers and records[0].numbers == records[1].numbers
    assert not (tmp_path / "stopped" / "work" / "00").exists()


def test_what_does_not_fit_is_not_taken(tmp_path: Path) -> None:
    parts, model = FinishedParts(tmp_path, "phase"), net()
    parts.keep("0", 0, model, ["0"], {"gain": 0.5})
    assert parts.restore("0", 0, model, ["0"]) == {"gain": 0.5}
    assert parts.restore("1", 0, model, ["0"]) is None  # another part's
    assert parts.restore("0", 0, model, ["4"]) is None  # other tensors
    assert parts.restore("0", 1, model, ["0"]) is None
    nowhere = FinishedParts(None, "phase")
    nowhere.keep("0", 0, model, ["0"], {})
    assert nowhere.restore("0", 0, model, ["0"]) is None
