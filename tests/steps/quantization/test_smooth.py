"""Quantize with SmoothQuant and AWQ: what is smoothed, what it gains, and that files and runtimes compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.errors import ConfigError
from gracile.layer_stats import LayerStats
from gracile.planner import integer_scheme
from gracile.steps.quantization.smooth import same_inputs


class Block(nn.Module):
    """Attention and a feed-forward net on a post-norm residual path, with outliers in two channels of the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        y: Tensor = self.outer(F.gelu(self.inner(x)))
        return y


def block() -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        model.norm.weight[[2, 9]] *= 40
        for layer in (model.query, model.key, model.value, model.inner):
            layer.weight[:, [2, 9]] /= 40
    return model


def batches(seed: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, 16, generator=generator) for _ in range(count)]


def error(model: nn.Module, original: nn.Module) -> float:
    x = torch.cat(batches(9))
    with torch.no_grad():
        return float((model(x) - original(x)).square().sum() / original(x).square().sum())


def compressed(equalize: gc.equalize.SmoothQuant | None) -> gc.Result:
    scheme = integer_scheme(gc.OnnxRuntime())  # weights of 7 bits where the processor adds products in 16
    assert scheme is not None
    step = gc.Quantize(scheme, equalize=equalize, correct=False)
    return gc.compress(block(), step, gc.Data(calibration=batches(1)))


def test_outlier_channels_cost_little_once_smoothed() -> None:
    original, plain, smoothed = block(), compressed(None), compressed(gc.equalize.SmoothQuant())
    assert error(smoothed.model, original) < 0.3 * error(plain.model, original)
    rows = {row.name for row in smoothed.report.steps[0].layers if row.action == "smoothed"}
    assert {"query", "key", "value", "inner"} <= rows
    assert any("linear layers are smoothed" in note for note in smoothed.report.steps[0].notes)
    assert not [row for row in plain.report.steps[0].layers if row.action == "smoothed"]


def test_layers_that_read_one_tensor_share_the_scales() -> None:
    model = compressed(gc.equalize.SmoothQuant()).model
    assert torch.equal(model.query.input_multiplier, model.key.input_multiplier)
    assert torch.equal(model.query.input_multiplier, model.value.input_multiplier)
    assert not torch.equal(model.query.input_multiplier, model.inner.input_multiplier)


def test_sets_are_told_by_what_was_seen() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    stats = {"q": a, "k": a.clone(), "other": b, "wide": torch.randn(4, 5)}
    groups = same_inputs({name: LayerStats(input_rows=rows) for name, rows in stats.items()})
    assert groups == [["q", "k"], ["other"], ["wide"]]


def test_the_weight_is_that_of_the_original_on_its_grid() -> None:
    original, model = block(), compressed(gc.equalize.SmoothQuant()).model
    weight = model.inner.decoded_weight() * model.inner.input_multiplier
    step = model.inner.weight_scale[:, None] * model.inner.input_multiplier
    assert bool(
        ((weight - original.inner.weight).abs() <= 0.51 * step + 0.5 * step).all()
    )  # MSE ranges may clip a step


def test_a_reloaded_model_is_equal_to_the_bit(tmp_path: Path) -> None:
    result = compressed(gc.equalize.SmoothQuant())
    result.save(tmp_path / "slim")
    again = gc.load(tmp_path / "slim", block())
    x = batches(5, 1)[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize("target", [gc.OnnxRuntime(), gc.OpenVINO()], ids=lambda target: target.name)
def test_runtimes_compute_the_same_and_share_one_grid(tmp_path: Path, target: gc.targets.Target) -> None:
    pytest.importorskip(target.name)
    model = compressed(gc.equalize.SmoothQuant()).model
    x = batches(5, 1)[0]
    path = target.export(model, x, tmp_path / f"model{target.suffix}")
    with torch.no_grad():
        expected = model(x)
    found = target.run(path, x)
    # A value on the edge between two codes may fall to either side: one step of an input, which is 1/255 of its range.
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    if target.name == "onnxruntime":
        import onnx

        nodes = [node.op_type for node in onnx.load(path).graph.node]
        smoothed = {
            row.name for row in compressed(gc.equalize.SmoothQuant()).report.steps[0].layers if row.action == "smoothed"
        }
        assert nodes.count("QuantizeLinear") == 4  # query, key and value share one
        assert nodes.count("Mul") >= len(smoothed - {"key", "value"})


def weights_only(equalize: gc.equalize.AWQ | None, solver: gc.solvers.GPTQ | None = None) -> gc.Result:
    step = gc.Quantize(gc.W4A16(group=8), equalize=equalize, solver=solver, correct=False)
    return gc.compress(block(), step, gc.Data(calibration=batches(1)))


def test_weights_that_read_outliers_are_scaled_up() -> None:
    original, plain, scaled = block(), weights_only(None), weights_only(gc.equalize.AWQ())
    rows = {row.name for row in scaled.report.steps[0].layers if row.action == "smoothed"}
    assert {"query", "key", "value"} <= rows
    assert error(scaled.model, original) < 0.8 * error(plain.model, original)
    multiplier = scaled.model.query.input_multiplier
    others = torch.ones(16, dtype=torch.bool).index_fill_(0, torch.tensor([2, 9]), False)
    assert float(multiplier[[2, 9]].max()) < float(multiplier[others].min())  # their weights are the larger for it


def test_a_solver_rounds_the_scaled_weights() -> None:
    original, scaled = block(), weights_only(gc.equalize.AWQ())
    solved = weights_only(gc.equalize.AWQ(), gc.solvers.GPTQ())
    assert error(solved.model, original) < error(scaled.model, original)


@pytest.mark.parametrize("target", [gc.OnnxRuntime(), gc.OpenVINO()], ids=lambda target: target.name)
def test_scaled_weights_are_saved_and_exported(tmp_path: Path, target: gc.targets.Target) -> None:
    pytest.importorskip(target.name)
    result, x = weights_only(gc.equalize.AWQ()), batches(5, 1)[0]
    result.save(tmp_path / "slim")
    path = target.export(result.model, x, tmp_path / f"model{target.suffix}")
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(gc.load(tmp_path / "slim", block())(x), expected)
    torch.testing.assert_close(target.run(path, x), expected, rtol=1e-3, atol=1e-4)  # sums in another order


def test_a_scheme_that_leaves_inputs_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to smooth"):
        gc.Quantize(gc.W8A16, equalize=gc.equalize.SmoothQuant())
    with pytest.raises(ConfigError, match="leave inputs in floating point"):
        gc.Quantize(gc.W8A8, equalize=gc.equalize.AWQ())
    with pytest.raises(ConfigError, match="equalize"):
        gc.Quantize(gc.W8A8, equalize=0.5)  # type: ignore[arg-type]
