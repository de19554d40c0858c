from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gracile.data import Data
from gracile.errors import RunError
from gracile.report.model import LayerRow, StepRecord
from gracile.run_directory import RunDirectory, fingerprint_data, fingerprint_model
from gracile.surgery import Edit, Resize, Swap, apply

IDENTITY: dict[str, Any] = {"model": "abc", "recipe": {"type": "Prune", "fraction": 0.3}, "seed": 0}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


CUT = Resize({"0.weight:0": (0, 2, 5), "0.bias:0": (0, 2, 5), "2.weight:1": (0, 2, 5)}, {"0.out_features": 3})
FOLDED = Swap("1", "Identity")


def record(title: str, *edits: Edit) -> StepRecord:
    row = LayerRow(name="0", kind="Linear", action="cut", kept=3, of=6, error=0.125)
    return StepRecord(step={"type": title}, title=title, seconds=1.5, layers=(row,), notes=("n",), edits=edits)


def test_finished_steps_come_back_with_their_edits_and_records(tmp_path: Path) -> None:
    model = net()
    run = RunDirectory(tmp_path / "run", IDENTITY)
    assert run.finished_steps() == 0
    apply(model, [FOLDED, CUT])
    records = [record("fold", FOLDED), record("cut", CUT)]
    run.finish_step(0, model, [FOLDED, CUT], records)
    again = RunDirectory(tmp_path / "run", dict(IDENTITY))
    assert again.finished_steps() == 1
    fresh = net().train()
    fresh[2].eval()
    edits, found = again.restore(0, fresh)
    assert edits == [FOLDED, CUT] and found == records
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
    assert [m.training for m in fresh] == [True, True, False]


def test_a_model_with_earlier_edits_is_restored_by_the_later_ones_alone(tmp_path: Path) -> None:
    model = net()
    apply(model, [FOLDED, CUT])
    model.gracile_edits = (FOLDED, CUT)
    later = Resize({"0.weight:0": (1,), "0.bias:0": (1,), "2.weight:1": (1,)}, {"0.out_features": 1})
    result = net()
    apply(result, [FOLDED, CUT, later])
    run = RunDirectory(tmp_path, IDENTITY)
    run.finish_step(0, result, [FOLDED, CUT, later], [])
    edits, _ = run.restore(0, model)
    assert edits == [FOLDED, CUT, later] and model[0].weight.shape == (1, 4)
    assert torch.equal(model[0].weight, result[0].weight)


def test_only_the_last_two_steps_and_no_checkpoints_of_finished_ones_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    for index in range(4):
        run.step_directory(index).mkdir(parents=True)
        (run.step_directory(index) / "epochs.safetensors").write_bytes(b"x")
        run.finish_step(index, net(), [], [])
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["02", "03"]
    assert not any((tmp_path / "work").iterdir())
    assert run.finished_steps() == 4


def test_what_a_kill_left_half_written_is_swept_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    run.finish_step(0, net(), [], [])
    (tmp_path / "steps" / ".01.12345678").mkdir()
    (tmp_path / "steps" / ".01.12345678" / "model.safetensors").write_bytes(b"half")
    again = RunDirectory(tmp_path, IDENTITY)
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["00"] and again.finished_steps() == 1


def test_a_step_whose_files_are_damaged_is_not_taken_for_sound(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    run.finish_step(0, net(), [], [])
    weights = tmp_path / "steps" / "00" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="does not match its checksum"):
        run.restore(0, net())


def test_decisions_are_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, IDENTITY)
    assert run.decision("width") is None
    run.decide("width", {"kept": 0.625, "tried": [1, 2]})
    assert RunDirectory(tmp_path, IDENTITY).decision("width") == {"kept": 0.625, "tried": [1, 2]}


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "", "{}"])
def test_a_directory_that_is_no_run_of_this_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run.json' cannot be read|belongs to another run"):
        RunDirectory(tmp_path, IDENTITY)


def test_another_run_is_named_by_what_differs(tmp_path: Path) -> None:
    RunDirectory(tmp_path, IDENTITY)
    with pytest.raises(RunError, match="recipe, seed differ"):
        RunDirectory(tmp_path, IDENTITY | {"seed": 1, "recipe": {"type": "Prune", "fraction": 0.4}})
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY


def test_a_model_s_fingerprint_follows_names_shapes_types_and_values() -> None:
    torch.manual_seed(0)
    one = net()
    prints = {fingerprint_model(one)}
    with torch.no_grad():
        one[0].weight[0, 0] += 1e-6
    prints.add(fingerprint_model(one))
    prints.add(fingerprint_model(one.to(torch.bfloat16)))
    prints.add(fingerprint_model(nn.Sequential(one[0], nn.ReLU(), one[2])))
    assert len(prints) == 4
    assert fingerprint_model(one) == fingerprint_model(one)


def test_data_s_fingerprint_follows_the_first_batches_and_leaves_the_random_state() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    dataset = torch.utils.data.TensorDataset(torch.randn(50, 3), torch.arange(50))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    before = torch.random.get_rng_state()
    data = Data(calibration=[x], train=loader, evaluation=[(x, y)])
    prints = fingerprint_data(data)
    assert set(prints) == {"calibration", "train", "evaluation"} and fingerprint_data(data) == prints
    assert torch.equal(torch.random.get_rng_state(), before)
    assert fingerprint_data(Data(calibration=[x + 1]))["calibration"] != prints["calibration"]
    assert fingerprint_data(Data(calibration=[x.double()]))["calibration"] != prints["calibration"]
    assert fingerprint_data(Data(calibration=[x.bfloat16()])) and fingerprint_data(Data()) == {}
