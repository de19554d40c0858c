"""Blocks and units to one budget: against each number of blocks by hand, and what can be done with the result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from clock import Clockwork, without_a_clock
from residual import Perceptron, ResidualMLP
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.context import Context
from gracile.graph import trace
from gracile.surgery import Remove, Resize


def net(scales: tuple[float, ...] = (2.0, 0.01, 3.0, 0.02, 2.5)) -> ResidualMLP:
    """Blocks of which those with a small scale do little, whatever their width."""
    return ResidualMLP(6, 12, 48, scales)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 6, generator=generator) for _ in range(16)]


def data() -> gc.Data:
    return gc.Data(calibration=batches())


def macs(model: nn.Module) -> int:
    return trace(model, lambda net: net(batches()[0])).macs


def held_out_kl(model: nn.Module, original: nn.Module) -> float:
    x = torch.cat(batches()[::8])
    with torch.no_grad():
        found, expected = (net.eval()(x).double().log_softmax(1) for net in (model, original))
    return float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))


def joint(amount: float, **settings: Any) -> gc.Prune:
    pattern = (gc.Channels(), gc.Layers(candidates=1))
    return gc.Prune(to=gc.MACs(amount), pattern=pattern, exclude=("stem",), **settings)


@pytest.mark.parametrize("repair", [None, gc.solvers.LeastSquares()], ids=str)
def test_as_many_blocks_go_as_serve_the_outputs_best(repair: Any) -> None:
    """Not worse than units cut from a model whose 0, 1 or 2 blocks were taken out by hand, which nothing makes good."""
    model = net()
    result = gc.compress(model, joint(0.6, repair=repair), data())
    record = result.report.steps[0]
    losses = []
    for gone in ((), (1,), (1, 3)):
        short = net()
        short.blocks = nn.ModuleList(block for i, block in enumerate(short.blocks) if i not in gone)
        units = gc.Prune(to=gc.MACs(0.6 * macs(model)), pattern=gc.Channels(), exclude=("stem",), repair=repair)
        if macs(short) > 0.6 * macs(model):
            short = gc.compress(short, units, data()).model  # type: ignore[assignment]
        losses.append(held_out_kl(short, model))
    found = held_out_kl(result.model, model)
    assert macs(result.model) <= 0.6 * macs(model)
    assert record.numbers["blocks_removed"] > 0
    assert found <= min(losses)
    assert record.numbers["divergence"] == pytest.approx(found, rel=1e-3, abs=1e-7)
    note = next(note for note in record.notes if note.startswith("Divergence on held-out batches by the number"))
    assert float(note.partition(" 0: ")[2].partition(",")[0]) == pytest.approx(losses[0], rel=1e-2)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp = Perceptron(12, 48)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 3 * self.heads)
        y: Tensor = self.mlp(x + self.out(mixed))
        return y


def test_heads_channels_and_layers_by_obs_with_measured_losses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), *(Attends() for _ in range(4)), nn.Flatten(), nn.Linear(60, 3))
    calibration = [torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    step = gc.Prune(
        to=gc.MACs(0.5),
        criterion=gc.criteria.OBS(),
        pattern=(gc.Channels(), gc.Heads(), gc.Layers(candidates=2)),
        allocation=gc.allocate.MeasuredLoss(rounds=1),
        repair=gc.solvers.LeastSquares(),
    )
    result = gc.compress(model, step, gc.Data(calibration=calibration))
    before, after = (trace(net, lambda m: m(calibration[0])).macs for net in (model, result.model))
    assert after <= 0.5 * before
    record = result.report.steps[0]
    tried = next(note for note in record.notes if note.startswith("Divergence on held-out batches by the number"))
    trials, _, rounds = tried.split("removed: ")[1].rstrip(".").partition("; with the allocation's rounds ")
    losses = [float(part.partition(": ")[2]) for part in trials.split(", ")]
    assert len(losses) >= 2
    assert min(*losses, float(rounds)) == pytest.approx(record.numbers["divergence"], rel=1e-2)


def test_rows_and_edits_are_of_both_and_the_artifact_loads(tmp_path: Any) -> None:
    result = gc.compress(net(), joint(0.5), data())
    record = result.report.steps[0]
    rows = {row.name: row.action for row in record.layers if row.kind == "Perceptron"}
    assert rows == {f"blocks.{i}": "removed" if i in (1, 3) else "kept" for i in range(5)}
    assert any(row.action == "cut" for row in record.layers)
    assert [type(edit) for edit in record.edits] == [Resize, Remove, Remove]
    assert record.title == "Prune channels and layers to MACs(0.5) by Magnitude"
    assert any(note.startswith("Divergence on held-out batches by the number of blocks") for note in record.notes)
    result.save(tmp_path / "model")
    loaded = gc.load(tmp_path / "model", net()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]), result.model.eval()(batches()[0]))


def test_blocks_that_all_matter_stay_and_the_units_meet_the_budget() -> None:
    model = net((2.0, 2.5, 3.0))
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight[24:] = 0.0  # type: ignore[union-attr,index]
            block.down.weight[:, 24:] = 0.0  # type: ignore[union-attr,index]
            block.up.bias[24:] = 0.0  # type: ignore[union-attr,index]
    result = gc.compress(model, joint(0.6), data())
    assert result.report.steps[0].numbers["blocks_removed"] == 0
    assert held_out_kl(result.model, model) < 1e-6
    assert len(result.model.blocks) == 3  # type: ignore[arg-type]


def test_blocks_alone_will_do_where_the_units_cannot_and_a_net_without_blocks_says_so() -> None:
    model = net((0.01, 0.01, 0.01))
    # 1,272 are left: the block that is excluded takes 1,260 with stem and head, and one unit of another 24 more.
    step = gc.Prune(to=gc.MACs(0.357), pattern=(gc.Channels(), gc.Layers()), exclude=("stem", "blocks.2.up"))
    result = gc.compress(model, step, data())
    assert macs(result.model) == 1260 <= 0.357 * macs(model)
    assert result.report.steps[0].numbers["blocks_removed"] == 2
    plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    result = gc.compress(plain, gc.Prune(to=gc.MACs(0.6), pattern=(gc.Channels(), gc.Layers())), data())
    assert any("No block was removed" in note for note in result.report.steps[0].notes)
    with pytest.raises(gc.ConfigError, match="cannot be met by blocks and units"):
        gc.compress(model, replaced(step, gc.MACs(0.001)), data())


def replaced(step: gc.Prune, budget: Any) -> gc.Prune:
    return gc.Prune(to=budget, pattern=step.pattern, exclude=step.exclude)


def test_the_model_given_stays_and_a_failed_step_leaves_it_whole() -> None:
    model = net().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gc.ConfigError):
        joint(0.001)(model, Context(data(), model, model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"fraction": 0.3}, {"below": 0.1}], ids=str)
def test_blocks_and_units_share_no_amount_but_a_budget(settings: Any) -> None:
    with pytest.raises(gc.ConfigError, match="no common amount but a budget"):
        gc.Prune(pattern=(gc.Channels(), gc.Layers()), **settings)
    with pytest.raises(gc.ConfigError, match="no common amount but a budget"):
        gc.Prune(to=gc.MACs(0.5), pattern=(gc.Layers(), gc.Layers()))


def begun_vectors(model: Any) -> float:
    """1 ms, and for each block 1 and one more for every begun vector of 8 inner channels."""
    return 1.0 + sum(1.0 - (-block.up.out_features // 8) for block in inner(model))


def inner(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Perceptron)]


ALLOCATIONS = [None, gc.allocate.MeasuredLoss(multiple_of=8, rounds=0, power=1.0), gc.allocate.MeasuredLoss(rounds=1)]


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=["GlobalRank", "MeasuredLoss", "rounds"])
@pytest.mark.parametrize("ms", [False, True], ids=["share", "ms"])
def test_a_budget_of_latency_is_one_of_the_model_as_it_was(
    allocation: Any, ms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_clock(monkeypatch)
    target, model = Clockwork(begun_vectors), net()
    assert begun_vectors(model) == 36.0
    settings: dict[str, Any] = {"allocation": allocation}
    if isinstance(allocation, gc.allocate.MeasuredLoss) and allocation.rounds:
        settings |= {"criterion": gc.criteria.OBS(), "repair": gc.solvers.LeastSquares()}
    pattern = (gc.Channels(), gc.Layers(candidates=1))
    budget = gc.Latency(21.6 if ms else 0.6, target=target, ms=ms)
    result = gc.compress(model, gc.Prune(to=budget, pattern=pattern, exclude=("stem",), **settings), data())
    record = result.report.steps[0]
    assert record.numbers["blocks_removed"] > 0 and record.numbers["units_removed"] > 0
    # This share of what is left without a block would be 17.4 ms at most.
    assert 20.0 <= begun_vectors(result.model) <= 21.6
    assert record.numbers["latency_before_ms"] == 36.0
    assert record.numbers["latency_ms"] == pytest.approx(begun_vectors(result.model))
    said = [note for note in record.notes if note.startswith("Latency of a batch")]
    assert len(said) == 1 and "36 ms before" in said[0] and "21.6 ms allowed" in said[0]
    if allocation is None:
        assert "latency_predicted_ms" not in record.numbers
    else:  # blocks share no layers, so that what the tables say adds up
        assert record.numbers["latency_predicted_ms"] == pytest.approx(begun_vectors(result.model))
    # The whole model is exported once, and each model without some blocks once before its units are cut.
    if allocation is not None:  # the tables of the copies are derived: these were cut for the whole model's alone
        alone = [net for net in target.exported if len(inner(net)) == 5 and begun_vectors(net) != 36.0]
        widths = {tuple(b.up.out_features for b in inner(net)) for net in alone}
        narrowest = min(widths)
        again = [b for net in alone if (b := tuple(b.up.out_features for b in inner(net))) == narrowest]
        assert len(widths) == len(alone) - len(again) + 1, "only the narrowest is timed again, with care"
        assert any("in proportion" in note for note in record.notes)
    uncut = [begun_vectors(net) for net in target.exported if all(b.up.out_features == 48 for b in inner(net))]
    tried = sorted(set(uncut), reverse=True)
    assert tried == [36.0 - 7.0 * gone for gone in range(len(tried))] and len(tried) >= 3
    assert len(uncut) == len(tried) + getattr(allocation, "rounds", 0), "the best once more, for its rounds"


def test_blocks_alone_may_meet_a_budget_of_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)
    step = gc.Prune(
        to=gc.Latency(0.4, target=Clockwork(begun_vectors)),
        pattern=(gc.Channels(), gc.Layers()),
        exclude=("stem", "blocks.2.up"),
    )
    result = gc.compress(net((0.01, 0.01, 0.01)), step, data())
    numbers = result.report.steps[0].numbers
    assert numbers["blocks_removed"] == 2 and "units_removed" not in numbers
    assert (numbers["latency_before_ms"], numbers["latency_ms"]) == (22.0, pytest.approx(8.0))
