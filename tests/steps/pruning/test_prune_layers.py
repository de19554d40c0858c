"""Blocks taken out: which, against measuring each by hand; how they vanish; and that what is left loads and exports."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from residual import ResidualMLP
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.context import Context
from gracile.graph import trace
from gracile.nn import Skip
from gracile.surgery import Remove, Swap


class Indexed(ResidualMLP):
    """Its forward counts on the number of blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(5):
            x = self.blocks[i](x)
        y: Tensor = self.head(x)
        return y


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return F.relu(y)


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.stage = nn.Sequential(ConvBlock(), ConvBlock(), ConvBlock())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stage(F.relu(self.stem(x))).mean((2, 3)))
        return y


class Attends(nn.Module):
    """Attention and a perceptron; returns a tuple and is called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm1, self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, length, _ = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).view(n, length, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        hidden = hidden + self.out((weights @ v).transpose(1, 2).reshape(n, length, 8))
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden)))), weights


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Attends() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x, _ = layer(hidden=x, mask=None)
        y: Tensor = self.head(x.mean(1))
        return y


MODELS: dict[str, type[nn.Module]] = {m.__name__: m for m in (ResidualMLP, Indexed, ResidualCNN, Transformer)}
each_model = pytest.mark.parametrize("name", MODELS)


def batches(name: str, count: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "Transformer":
        return [torch.randint(0, 11, (8, 6), generator=generator) for _ in range(count)]
    shape = (8, 3, 6, 6) if name == "ResidualCNN" else (8, 5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def setup(name: str) -> tuple[Any, Context]:
    model = MODELS[name]().eval()
    original = copy.deepcopy(model)
    return model, Context(gc.Data(calibration=batches(name)), original, original)


def kl(model: Any, without: tuple[int, ...]) -> float:
    """KL(softmax y₀ ‖ softmax y) over all calibration examples with blocks passed over, in float64."""
    x = torch.cat(batches("ResidualMLP"))
    outputs = []
    for gone in ((), without):
        y = model.stem(x)
        for i, block in enumerate(model.blocks):
            y = y if i in gone else block(y)
        outputs.append(model.head(y).double().log_softmax(1))
    return float(F.kl_div(outputs[1], outputs[0], log_target=True, reduction="batchmean"))


def test_each_time_the_block_goes_whose_absence_changes_the_outputs_least() -> None:
    model, context = setup("ResidualMLP")
    with torch.no_grad():
        first = min(range(5), key=lambda i: kl(model, (i,)))
        second = min(set(range(5)) - {first}, key=lambda i: kl(model, (first, i)))
        expected = {f"blocks.{i}": kl(model, (first, second, i)) for i in set(range(5)) - {first, second}}
        expected |= {f"blocks.{first}": kl(model, (first,)), f"blocks.{second}": kl(model, (first, second))}
    kept = [block for i, block in enumerate(model.blocks) if i not in (first, second)]
    record = gc.Prune(0.4, pattern=gc.Layers(), correct=False)(model, context)
    rows = {row.name: row for row in record.layers}
    assert {n for n, row in rows.items() if row.action == "removed"} == {f"blocks.{first}", f"blocks.{second}"}
    assert {n for n, row in rows.items() if row.action == "kept"} == set(rows) - {f"blocks.{first}", f"blocks.{second}"}
    for n, row in rows.items():
        assert row.error == pytest.approx(expected[n], rel=1e-3, abs=1e-7)  # logits are float32
    assert [a is b for a, b in zip(model.blocks, kept, strict=True)] == [True] * 3
    assert record.numbers["blocks_removed"] == 2


@each_model
def test_what_is_left_computes_as_if_the_blocks_were_passed_over(name: str) -> None:
    model, context = setup(name)
    record = gc.Prune(0.5, pattern=gc.Layers(), correct=False)(model, context)
    original: Any = context.original
    gone = {row.name for row in record.layers if row.action == "removed"}
    hooks = [
        original.get_submodule(n).register_forward_hook(
            lambda m, args, kwargs, y: (kwargs["hidden"], *y[1:]) if isinstance(y, tuple) else args[0], with_kwargs=True
        )
        for n in gone
    ]
    x = batches(name)[3]
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    for hook in hooks:
        hook.remove()
    assert gone and sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in original.parameters())
    kind = Swap if name == "Indexed" else Remove
    assert len(record.edits) == len(gone) and all(isinstance(edit, kind) for edit in record.edits)
    assert any(isinstance(m, Skip) for m in model.modules()) == (name == "Indexed")


TESTS = str(Path(__file__).resolve().parents[2])
READER = """
import importlib.util, sys
import torch
import gracile
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
spec = importlib.util.spec_from_file_location("layer_nets", sys.argv[1])
nets = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = nets
spec.loader.exec_module(nets)
for name, model in nets.MODELS.items():
    loaded = gracile.load(f"{sys.argv[2]}/{name}", model())
    with torch.no_grad():
        found = loaded(nets.batches(name)[0])
    print(name, [float.hex(v) for v in found.double().flatten().tolist()])
"""


def test_they_load_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for name, build in MODELS.items():
        step = gc.Prune(0.5, pattern=gc.Layers(), repair=gc.solvers.LeastSquares())
        result = gc.compress(build(), step, gc.Data(calibration=batches(name)))
        result.save(tmp_path / name)
        with torch.no_grad():
            found = result.model.eval()(batches(name)[0])
        expected[name] = str([float.hex(v) for v in found.double().flatten().tolist()])
    run = subprocess.run(
        [sys.executable, "-c", READER, __file__, str(tmp_path), TESTS], capture_output=True, text=True, check=True
    )
    assert dict(line.split(" ", 1) for line in run.stdout.splitlines()) == expected


#: OpenVINO's compiler crashes the process on the perceptrons of 8 units, uncut ones too.
EXPORTS = [
    *[(name, gc.OnnxRuntime()) for name in MODELS],
    ("ResidualCNN", gc.OpenVINO()),
    ("Transformer", gc.OpenVINO()),
]


@pytest.mark.parametrize(("name", "target"), EXPORTS, ids=str)
def test_the_runtimes_compute_the_same(name: str, target: Any, tmp_path: Path) -> None:
    if target.available() is not None:
        pytest.skip("not installed")
    model, context = setup(name)
    gc.Prune(0.5, pattern=gc.Layers())(model, context)
    x = batches(name)[0]
    runner = target.load(target.export(model, x, tmp_path / "model"))
    with torch.no_grad():
        expected = model(x)
    found = runner(x)
    # The runtimes sum in another order, some 1e-6 a layer.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_blocks_go_until_the_budget_is_met_and_no_further() -> None:
    model, context = setup("ResidualMLP")
    full = trace(model, lambda net: net(batches("ResidualMLP")[0])).macs
    gc.Prune(to=gc.MACs(0.55), pattern=gc.Layers(), correct=False)(model, context)
    macs = trace(model, lambda net: net(batches("ResidualMLP")[0])).macs
    block = 2 * 8 * 16
    assert macs <= 0.55 * full < macs + block
    model, context = setup("ResidualMLP")
    size = sum(p.numel() for p in model.parameters())
    gc.Prune(to=gc.Parameters(0.82), pattern=gc.Layers(), correct=False)(model, context)
    assert len(model.blocks) == 4 and sum(p.numel() for p in model.parameters()) <= 0.82 * size


def test_a_threshold_is_on_the_divergence_of_the_outputs() -> None:
    model, context = setup("ResidualMLP")
    with torch.no_grad():
        ranked = sorted((kl(model, pair), pair) for pair in itertools.combinations(range(5), 2))
    record = gc.Prune(below=ranked[0][0] * 1.001, pattern=gc.Layers(), correct=False)(model, context)
    assert record.numbers["divergence"] < ranked[0][0] * 1.001
    model, context = setup("ResidualMLP")
    with pytest.raises(gc.NothingChangedError, match="none of 5 residual blocks was removed"):
        gc.Prune(below=1e-9, pattern=gc.Layers())(model, context)
    assert len(model.blocks) == 5


def test_repair_lowers_the_output_error_of_a_net_without_blocks() -> None:
    errors = []
    for repair in (None, gc.solvers.LeastSquares()):
        model, context = setup("ResidualMLP")
        record = gc.Prune(0.4, pattern=gc.Layers(), repair=repair)(model, context)
        x = torch.randn(512, 5, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            errors.append(float((model(x) - context.original(x)).square().mean()))
    assert errors[1] < errors[0]
    refitted = {row.name for row in record.layers if row.action == "refitted"}
    assert refitted and "stem" not in refitted


def test_excluded_blocks_stay_and_a_part_of_one_protects_it() -> None:
    model, context = setup("ResidualMLP")
    step = gc.Prune(0.99, pattern=gc.Layers(), exclude=("blocks.1", "blocks.3.up"), correct=False)
    record = step(model, context)
    rows = {row.name: row.reason for row in record.layers if row.action == "skipped"}
    assert rows == {"blocks.1": "excluded", "blocks.3": "it holds 'blocks.3.up', which is excluded"}
    assert len(model.blocks) == 2
    model, context = setup("ResidualMLP")
    record = gc.only("blocks.2", gc.Prune(0.99, pattern=gc.Layers(), correct=False))(model, context)
    assert [row.name for row in record.layers] == ["blocks.2"] and len(model.blocks) == 4


def test_what_cannot_be_says_why() -> None:
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    context = Context(gc.Data(calibration=batches("ResidualMLP")), plain, plain)
    with pytest.raises(gc.ConfigError, match=r"nothing that Layers\(\) can remove[\s\S]*no residual blocks"):
        gc.Prune(0.5, pattern=gc.Layers())(plain, context)
    model, context = setup("ResidualMLP")
    with pytest.raises(gc.ConfigError, match=r"cannot be met; without all 5 residual blocks 64 of"):
        gc.Prune(to=gc.MACs(0.01), pattern=gc.Layers())(model, context)
    assert len(model.blocks) == 5
    for wrong in ({"criterion": gc.Taylor()}, {"allocation": gc.allocate.Uniform()}):
        with pytest.raises(gc.ConfigError, match="Give no criterion and no allocation"):
            gc.Prune(0.5, pattern=gc.Layers(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(gc.ConfigError, match="examples"):
        gc.Layers(examples=0)
    with pytest.raises(gc.DataError, match="has no data"):
        gc.Prune(0.5, pattern=gc.Layers()).check(model, Context(gc.Data(), model, model))
