"""Factorize: what it replaces, leaves and says, and that what follows works on what it made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.evaluate.size import state_bytes
from gracile.graph import trace
from gracile.nn import Factorized
from gracile.planner import integer_scheme
from gracile.report.model import StepRecord
from gracile.surgery import apply


class Perceptron(nn.Module):
    shape = (16,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return y


class Convolutional(nn.Module):
    """Strides, a dilation, a batch norm that takes up the mean of a layer without a bias, and a stream."""

    shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.fc = nn.Conv2d(12, 12, 3, groups=12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        y: Tensor = self.fc(self.depthwise(x).mean((2, 3)))
        return y


class Attention(nn.Module):
    """nn.MultiheadAttention reads the weight of its projection without calling it; the head's is the embedding's."""

    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = self.head(x + self.down(F.gelu(self.up(x)))).mean(1)
        return y


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net.eval()


def batches(kind: type[Any], count: int = 9) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    if kind is Attention:
        return [torch.randint(0, 20, (16, *kind.shape), generator=g) for g in generators]
    return [torch.randn(16, *kind.shape, generator=g) for g in generators]


def compress(kind: type[Any], step: Any, **settings: Any) -> tuple[gc.Result, StepRecord]:
    result = gc.compress(make(kind), step, gc.Data(calibration=batches(kind)), **settings)
    return result, result.report.steps[0]


def factorized(model: nn.Module) -> dict[str, Factorized]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Factorized)}


def outputs(model: nn.Module, kind: type[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in batches(kind)])


KINDS: list[type[Any]] = [Perceptron, Convolutional, Attention]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_share_of_the_weights_of_the_layers_that_may_be_factorized_goes(kind: type[Any]) -> None:
    result, record = compress(kind, gc.Factorize(0.3))
    original, may = make(kind), {r.name for r in record.layers if r.action in ("factorized", "kept")}
    whole = sum(original.get_submodule(name).weight.numel() for name in may)  # type: ignore[union-attr,operator]
    found = factorized(result.model)
    left = sum(
        found[n].first.weight.numel() + found[n].second.weight.numel()
        if n in found
        else original.get_submodule(n).weight.numel()  # type: ignore[union-attr,operator]
        for n in may
    )
    assert record.numbers["weights_before"] == whole and record.numbers["weights_after"] == left <= 0.7 * whole
    assert {r.name: r.kept for r in record.layers if r.action == "factorized"} == {
        name: layer.first.weight.shape[0] for name, layer in found.items()
    }
    assert all(0 < r.error < 1 for r in record.layers if r.action == "factorized" and r.error is not None)
    assert record.numbers["factorized_error"] < 1e-10


def test_what_is_left_and_why() -> None:
    _, record = compress(Attention, gc.Factorize(0.3))
    reasons = {r.name: r.reason or "" for r in record.layers if r.action == "skipped"}
    assert "holds its weight too" in reasons["head"] and "no factorized layer" in reasons["embed"]
    assert "another module's forward" in reasons["attention.out_proj"]
    assert "no factorized layer" in reasons["attention"]
    _, record = compress(Convolutional, gc.Factorize(0.3, exclude=("fc",)))
    skipped = {r.name: r.reason for r in record.layers if r.action == "skipped"}
    assert skipped == {"depthwise": "a convolution of 12 groups"}
    assert not any(r.name == "fc" and r.action in ("factorized", "kept") for r in record.layers)


@each_kind
@pytest.mark.parametrize("budget", [gc.MACs(0.8), gc.Parameters(0.85), gc.Bytes(0.85)], ids=str)
def test_budgets_are_met_and_not_by_far_more_than_asked(kind: type[Any], budget: Any) -> None:
    result, _ = compress(kind, gc.Factorize(to=budget, levels=16))

    def cost(model: nn.Module) -> float:
        if isinstance(budget, gc.MACs):
            return float(trace(model, lambda net: net(batches(kind)[0])).macs)
        parameters = sum(p.numel() for p in model.parameters())
        return float(state_bytes(model)) if isinstance(budget, gc.Bytes) else float(parameters)

    share = cost(result.model) / cost(make(kind))
    assert budget.amount - 0.06 < share <= budget.amount  # steps of one rank of the largest layer


def test_more_is_refused_with_what_can_be_reached_and_less_where_nothing_is_to_do() -> None:
    with pytest.raises(ConfigError, match=r"cannot be met; the nearest .* of 1376 \(0\.\d+\)"):
        compress(Perceptron, gc.Factorize(to=gc.MACs(0.01)))
    with pytest.raises(ConfigError, match="within this budget already"):
        compress(Perceptron, gc.Factorize(to=gc.Parameters(1e6)))
    with pytest.raises(ConfigError, match="of the 1376 weights of 3 layers go"):
        compress(Perceptron, gc.Factorize(0.99))
    with pytest.raises(DataError, match="no data"):
        gc.compress(make(Perceptron), gc.Factorize(0.3))
    with pytest.raises(ConfigError, match="No layer matches 'fc9'"):
        compress(Perceptron, gc.Factorize(0.3, exclude=("fc9",)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fraction": 0.3, "to": gc.MACs(0.5)},
        {"fraction": 1.0},
        {"fraction": True},
        {"to": 0.5},
        {"fraction": 0.3, "solver": gc.solvers.LeastSquares()},
        {"fraction": 0.3, "repair": gc.solvers.LowRank()},
        {"fraction": 0.3, "levels": 0},
        {"fraction": 0.3, "examples": 1.5},
        {"fraction": 0.3, "power": 0.0},
        {"fraction": 0.3, "multiple_of": 0},
        {"fraction": 0.3, "exclude": "fc1"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Factorize"):
        gc.Factorize(**settings)


def test_a_layer_whose_outputs_span_few_directions_is_factorized_without_loss() -> None:
    """fc2 of rank 3 by construction: at rank 3 and above nothing is lost, and that is found."""
    model = make(Perceptron)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    model.fc2.weight.data = weight / 10  # type: ignore[union-attr]
    result = gc.compress(model, gc.Factorize(0.3), gc.Data(calibration=batches(Perceptron)))
    assert set(factorized(result.model)) == {"fc2"}
    difference = (outputs(result.model, Perceptron) - outputs(model, Perceptron)).abs().max()
    assert float(difference) < 1e-5  # float32, and moments of float32 products


@each_kind
def test_it_is_nearer_to_the_original_than_the_plain_decomposition_at_the_same_ranks(kind: type[Any]) -> None:
    result, record = compress(kind, gc.Factorize(0.5))
    plain: Any = make(kind)
    for row in record.layers:
        if row.action == "factorized":
            weight = plain.get_submodule(row.name).weight
            u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
            weight.data = ((u[:, : row.kept] * s[: row.kept]) @ v[: row.kept]).reshape(weight.shape)
    wanted = outputs(make(kind), kind)
    errors = [float((outputs(net, kind) - wanted).square().sum()) for net in (result.model, plain)]
    assert errors[0] < 0.9 * errors[1]


def many() -> gc.Data:
    """Enough examples for a least-squares fit of 32 inputs to hold for others."""
    return gc.Data(calibration=[torch.randn(512, 16, generator=torch.Generator().manual_seed(i)) for i in range(9)])


def test_a_repair_refits_whole_layers_behind_it_and_brings_the_outputs_nearer() -> None:
    model: Any = make(Perceptron)
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(32, 3, generator=generator) @ torch.randn(3, 16, generator=generator) / 4
    model.fc1.weight.data = low + 0.3 * model.fc1.weight.data  # of nearly rank 3, so that this layer is chosen
    wanted, errors = outputs(model, Perceptron), []
    for repair in (gc.solvers.LeastSquares(), None):
        step = gc.Factorize(0.1, repair=repair, correct=False)
        result = gc.compress(model, step, many())
        errors.append(float((outputs(result.model, Perceptron) - wanted).square().sum()))
        actions = {row.name: row.action for row in result.report.steps[0].layers}
        left = "kept" if repair is None else "refitted"
        assert actions == {"fc1": "factorized", "fc2": left, "fc3": left}
        assert torch.equal(result.model.fc3.weight, model.fc3.weight) == (repair is None)  # type: ignore[union-attr,arg-type]
    assert errors[0] < errors[1]


def test_a_repair_leaves_pruned_weights_at_zero() -> None:
    recipe = gc.Recipe(gc.Prune(0.5, correct=False), gc.Factorize(0.4, repair=gc.solvers.LeastSquares(), power=0.5))
    result = gc.compress(make(Perceptron), recipe, many())
    refitted = [row.name for row in result.report.steps[1].layers if row.action == "refitted"]
    assert refitted
    for name in refitted:
        weight = result.model.get_submodule(name).weight
        assert int((weight == 0).sum()) >= 0.3 * weight.numel()  # type: ignore[union-attr,operator,arg-type]


def test_the_plan_is_what_compress_then_does() -> None:
    model, step = make(Convolutional), gc.Factorize(0.4)
    before = copy.deepcopy(model.state_dict())
    plan = step.plan(model, gc.Data(calibration=batches(Convolutional)), seed=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result, record = compress(Convolutional, step, seed=2)
    assert plan.layers == record.layers and plan.edits == record.edits
    assert plan.numbers["parameters_after"] == sum(p.numel() for p in result.model.parameters())


@each_kind
def test_it_is_saved_and_loaded_bit_for_bit(kind: type[Any], tmp_path: Path) -> None:
    result, _ = compress(kind, gc.Factorize(0.4))
    result.save(tmp_path / "slim")
    loaded = gc.load(tmp_path / "slim", kind())
    assert torch.equal(outputs(loaded, kind), outputs(result.model, kind))


@each_kind
@pytest.mark.parametrize("target", [gc.OnnxRuntime(threads=1), gc.OpenVINO(threads=1)], ids=lambda t: t.name)
def test_the_export_computes_what_the_model_does(kind: type[Any], target: Any, tmp_path: Path) -> None:
    if target.available() is not None:
        pytest.skip(target.available())
    result, _ = compress(kind, gc.Factorize(0.4))
    evidence = gc.export(result.model, target, tmp_path / f"m{target.suffix}", batches(kind)[0])
    assert evidence.parity.max_error < 1e-4


@pytest.mark.parametrize("kind", [Perceptron, Convolutional])
def test_quantized_factors_are_exported_too(kind: type[Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    integers = integer_scheme(gc.OnnxRuntime())  # weights of 7 bits where the processor adds products in 16
    assert integers is not None
    result, _ = compress(kind, gc.Recipe(gc.Factorize(0.4), gc.Quantize(integers)))
    evidence = gc.export(result.model, gc.OnnxRuntime(threads=1), tmp_path / "m.onnx", batches(kind)[0])
    assert evidence.parity.max_error < 0.02 * float(outputs(result.model, kind).abs().max())  # a step of an 8-bit grid


def test_factors_are_quantized_trained_and_pruned_like_other_layers() -> None:
    labelled = [(x, torch.zeros(16, dtype=torch.long)) for x in batches(Perceptron)]
    data = gc.Data(calibration=batches(Perceptron), train=labelled, loss=gc.losses.cross_entropy)
    step = gc.Recipe(
        gc.Factorize(0.3, levels=2),
        gc.Prune(0.25, pattern=gc.Channels(), allocation=gc.allocate.Uniform()),
        gc.Distill(epochs=1),
        gc.Quantize(gc.W8A8),
    )
    model = make(Perceptron)
    result = gc.compress(model, step, data)
    first, cut, _, last = result.report.steps
    names = [row.name for row in first.layers if row.action == "factorized"]
    units = {row.name for row in cut.layers if row.action == "cut"}
    assert any(f"{name}.first" in units for name in names)  # ranks are units
    quantized = {row.name for row in last.layers if row.action == "quantized"}
    assert {f"{name}.{part}" for name in names for part in ("first", "second")} <= quantized
    fresh = make(Perceptron)
    apply(fresh, result.edits)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, Perceptron), outputs(result.model, Perceptron))


@pytest.mark.parametrize("earlier", [gc.Quantize(gc.Int(8)), gc.Factorize(0.3)], ids=["quantized", "factorized"])
def test_what_is_quantized_or_factorized_already_is_skipped(earlier: Any) -> None:
    step = gc.Recipe(gc.only("fc2", earlier), gc.Factorize(0.3))
    result, _ = compress(Perceptron, step)
    rows = {row.name: row for row in result.report.steps[1].layers if row.action == "skipped"}
    word = "quantized" if isinstance(earlier, gc.Quantize) else "factorized"
    assert set(rows) == {"fc2"} and f"{word} already" in str(rows["fc2"].reason)


def test_a_run_that_was_stopped_goes_on_behind_it(tmp_path: Path) -> None:
    data = gc.Data(calibration=batches(Perceptron))
    recipe = gc.Recipe(gc.Factorize(0.4), gc.Quantize(gc.W8A8))
    once = gc.compress(make(Perceptron), recipe, data)

    def stop(progress: gc.Progress) -> None:
        if progress.phase == "calibrate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gc.compress(make(Perceptron), recipe, data, run_dir=tmp_path / "run", on_progress=stop)
    phases: list[str] = []
    again = gc.compress(
        make(Perceptron), recipe, data, run_dir=tmp_path / "run", on_progress=lambda p: phases.append(p.phase)
    )
    assert "factorize" not in phases and "calibrate" in phases
    assert torch.equal(outputs(again.model, Perceptron), outputs(once.model, Perceptron))


def test_nothing_to_factorize_is_said_with_the_reasons() -> None:
    with pytest.raises(NothingChangedError, match="1: no rank has fewer weights than 1 x 4"):
        gc.compress(
            nn.Sequential(nn.Flatten(), nn.Linear(4, 1)).eval(),
            gc.Factorize(0.3),
            gc.Data(calibration=[torch.ones(3, 4)]),
        )
