from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Data
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.formats import W2A2, W4A16, W8A8, W8A16, FixedPoint, Int, PerChannel, PerGroup, PerTensor, Scheme
from gracile.nn import QuantizedLayer
from gracile.ranges import MSE, MinMax, Percentile
from gracile.recipe import only
from gracile.steps import Prune, Quantize
from gracile.surgery import apply


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.2, 3)
    return net.eval()


class Tagger(nn.Module):
    """Embeddings, of which one is tied to the output; an LSTM; and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shapes = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.rnn, self.mix, self.idle = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.words(x) + self.shapes(x % 5))
        out: Tensor = self.head(torch.tanh(self.mix(y)))
        return out


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def batches(model: nn.Module, count: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, Tagger):
        return [torch.randint(0, 11, (4, 6), generator=generator) for _ in range(count)]
    shape = (8, 8) if isinstance(model[0], nn.Linear) else (8, 4, 6, 6)  # type: ignore[index]
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def context(model: nn.Module, calibrated: bool = True) -> Context:
    original = copy.deepcopy(model)
    return Context(Data(calibration=batches(model)) if calibrated else Data(), original, original)


LAYERS = {mlp: {"0", "2"}, cnn: {"0", "3", "6", "9"}, tagger: {"words", "shapes", "mix", "idle", "head"}}
SCHEMES = [W8A8, W8A16, W4A16(group=4), Int(3), Int(4, PerTensor(), symmetric=False), FixedPoint(64)]


def outputs(model: nn.Module, data: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in data])


@pytest.mark.parametrize("make", LAYERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_layer_has_a_row_with_the_error_that_its_weights_have(make: Any, scheme: Any) -> None:
    model = make()
    floats = {name: copy.deepcopy(model.get_submodule(name)) for name in LAYERS[make]}
    data = batches(model)
    before = outputs(model, data)
    record = Quantize(scheme, ranges=MinMax(), correct=False)(model, context(model))
    done = {row.name: row for row in record.layers if row.action == "quantized"}
    assert (done.pop("rnn", None) is not None) == (make is tagger)
    idle = {"idle"} if make is tagger and scheme is W8A8 else set()
    assert set(done) == LAYERS[make] - idle
    skipped = {row.name: row.reason for row in record.layers if row.action == "skipped"}
    assert skipped == dict.fromkeys(idle, "never called on the calibration batches")
    for name, row in done.items():
        layer: Any = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer) and not layer.training
        weight, decoded = floats[name].weight.detach().double(), layer.decoded_weight().double()
        folded = scheme is W8A8 and name in ("0", "3") and make is cnn
        if not folded:
            assert row.error == pytest.approx(
                float((decoded - weight).square().sum() / weight.square().sum()), rel=1e-3
            )
        stored = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n.startswith("weight_"))
        assert row.bits == pytest.approx(8 * stored / weight.numel())
        assert row.sparsity == pytest.approx(float((decoded == 0).double().mean()))
        assert row.kind == type(floats[name]).__name__
    error = float((outputs(model, data) - before).square().sum() / before.square().sum())
    assert 0 < error < (0.3 if getattr(scheme, "bits", 8) < 5 else 0.02)


def test_weights_lie_on_the_grid_that_numpy_finds() -> None:
    model = mlp()
    w = model[0].weight.detach().double().numpy()  # type: ignore[index]
    Quantize(Int(8, PerChannel(0)), ranges=MinMax())(model, context(model, False))
    scale = np.abs(w).max(1, keepdims=True) / 127
    expected = np.clip(np.round(w / scale), -128, 127) * scale
    np.testing.assert_allclose(model[0].decoded_weight(), expected, rtol=1e-5)  # type: ignore[index,operator]


def test_the_textbook_formula() -> None:
    model = mlp()
    w = model[2].weight.detach().numpy()  # type: ignore[index]
    Quantize(FixedPoint(factor=256))(model, context(model, False))
    assert np.array_equal(model[2].decoded_weight().numpy(), np.round(w * 256) / 256)  # type: ignore[index,operator]


def test_inputs_lie_on_the_grid_of_what_calibration_saw() -> None:
    model = mlp()
    data = batches(model)
    low, high = (float(f(torch.stack([getattr(x, f.__name__)() for x in data]))) for f in (torch.min, torch.max))
    Quantize(W8A8, ranges=MinMax(), correct=False)(model, context(model))
    scale = (high - low) / 255
    assert model[0].input_scale.item() == pytest.approx(scale, rel=1e-5)  # type: ignore[index,union-attr,operator]
    assert model[0].input_zero_point.item() == round(-low / scale)  # type: ignore[index,union-attr,operator]


def test_batch_norms_are_folded_only_where_inputs_are_quantized() -> None:
    for scheme in (W8A8, W8A16, Int(3)):
        model = cnn()
        record = Quantize(scheme, ranges=MinMax(), correct=False)(model, context(model))
        folded = {row.name: row.reason for row in record.layers if row.action == "folded"}
        expected = {"1": "into 0", "4": "into 3"} if scheme is W8A8 else {}
        assert folded == expected
        assert isinstance(model[1], nn.Identity if expected else nn.BatchNorm2d)  # type: ignore[index]


@pytest.mark.parametrize("scheme", [Scheme("W3A8", Int(3), W8A8.input), Int(3)], ids=str)
@pytest.mark.parametrize("make", [mlp, cnn], ids=lambda f: f.__name__)
def test_correction_matches_each_layer_to_its_float_self(make: Any, scheme: Any) -> None:
    """A folded layer's biases must move by as little as its rounding moved its means, not by what was folded in."""
    original, corrected, plain = make(), make(), make()
    data = batches(original)
    record = Quantize(scheme, ranges=MinMax())(corrected, context(corrected))
    Quantize(scheme, ranges=MinMax(), correct=False)(plain, context(plain))
    fresh = batches(original, 14)[9:]
    errors = [float((outputs(m, fresh) - outputs(original, fresh)).square().sum()) for m in (corrected, plain)]
    assert record.numbers["output_error"] <= record.numbers["output_error_before_correction"]
    held_out = data[::8]
    expected = outputs(original, held_out).double()
    error = float((outputs(corrected, held_out) - expected).square().sum() / expected.square().sum())
    assert error == pytest.approx(record.numbers["output_error"], rel=1e-3)
    assert errors[0] <= 1.1 * errors[1]  # on batches that it has not seen, no worse but for chance
    for a, b in zip(corrected.parameters(), plain.parameters()):
        assert float((a - b).detach().abs().max()) < 0.25


def test_zeros_stay_zero() -> None:
    for scheme in SCHEMES:
        model = cnn()
        ctx = context(model)
        Prune(0.5, correct=False)(model, ctx)
        zeros = {name: model.get_submodule(name).weight == 0 for name in LAYERS[cnn]}
        record = Quantize(scheme, ranges=MinMax(), correct=False)(model, ctx)
        for name, mask in zeros.items():
            layer: Any = model.get_submodule(name)
            assert not layer.decoded_weight()[mask].any() and mask.any()
        assert all(row.sparsity >= 0.49 for row in record.layers if row.action == "quantized")  # type: ignore[operator]


def test_edits_rebuild_the_model() -> None:
    for make in (mlp, cnn, tagger):
        for scheme in SCHEMES:
            model, fresh = make(), make()
            data = batches(model, 2)
            record = Quantize(scheme, ranges=MinMax(), correct=False)(model, context(model))
            apply(fresh, record.edits)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(outputs(fresh, data), outputs(model, data))


def unchanged(model: nn.Module, like: nn.Module) -> bool:
    a, b = model.state_dict(), like.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7), b[k].nan_to_num(7)) for k in a)


def test_a_last_group_of_a_row_may_be_shorter() -> None:
    model = cnn()
    Quantize(W4A16(group=9))(model, context(model))
    assert model[6].weight_scale.shape == (8, 2)  # type: ignore[union-attr]  # rows of 4 · 2 · 2 weights


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_named_before_anything_is_changed(scheme: Any, bad: float) -> None:
    model, like = cnn(), cnn()
    with torch.no_grad():
        for net in (model, like):
            net[9].weight[2, 3] = bad  # type: ignore[index,operator]
    with pytest.raises(DataError, match="layer '9' holds NaN or infinity"):
        Quantize(scheme)(model, context(model))
    assert unchanged(model, like)


def test_calibration_is_required_where_inputs_are_measured() -> None:
    model = mlp()
    with pytest.raises(DataError, match=r"Quantize\(W8A8\) measures[\s\S]*W8A16") as caught:
        Quantize(W8A8).check(model, context(model, False))
    assert "labels are not needed" in str(caught.value)
    for scheme in SCHEMES[1:]:
        Quantize(scheme)(mlp(), context(model, False))


def test_what_is_quantized_already_is_said_to_be() -> None:
    model = mlp()
    Quantize(W8A16)(model, context(model))
    with pytest.raises(NothingChangedError, match="0: quantized already"):
        Quantize(W4A16(group=4))(model, context(model))


def test_a_model_that_is_one_layer_says_how_to_wrap_it() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(NothingChangedError, match=r"wrap it: nn.Sequential\(model\)"):
        Quantize(W8A16)(model, context(nn.Sequential(nn.Linear(8, 8)), False))
    assert isinstance(model.weight, nn.Parameter)


def test_layers_are_chosen_by_patterns_and_several_steps_add_up() -> None:
    model = cnn()
    ctx = context(model)
    only(("0", "3"), Quantize(W8A16))(model, ctx)
    record = Quantize(W4A16(group=2), exclude=("6",))(model, ctx)
    formats = {n: m.weight_format.bits for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert formats == {"0": 8, "3": 8, "9": 4}
    assert {r.name: r.reason for r in record.layers if r.action == "skipped"} == {
        "0": "quantized already",
        "3": "quantized already",
    }
    with pytest.raises(ConfigError, match="No layer matches 'nothing'"):
        Quantize(W8A16, exclude=("nothing",))(cnn(), ctx)


def test_channels_of_a_transposed_convolution_are_those_of_its_output() -> None:
    model = cnn()
    Quantize(W8A16)(model, context(model))
    assert model[6].weight_scale.shape == (4,)  # type: ignore[index,union-attr]
    assert model[6].weight_format == Int(8, PerChannel(1))  # type: ignore[index,union-attr]


def test_half_precision_models_keep_their_type() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = mlp().to(dtype)
        Quantize(W8A16)(model, context(model, False))
        y = model(torch.ones(2, 8, dtype=dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()


class Shared(nn.Module):
    """One convolution called twice, each time with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        nn.init.uniform_(self.second.running_var, 2.0, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.conv(torch.relu(self.first(self.conv(x)))))
        return y


def test_a_layer_called_twice_keeps_both_batch_norms() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    original = copy.deepcopy(model)
    data = [torch.randn(4, 3, 5, 5) for _ in range(3)]
    record = Quantize(W8A8)(model, Context(Data(calibration=data), original, original))
    assert not [row for row in record.layers if row.action == "folded"]
    a, b = outputs(model, data), outputs(original, data)
    assert float((a - b).square().sum() / b.square().sum()) < 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Quantize(W4A16),  # type: ignore[arg-type]
        lambda: Quantize("int8"),  # type: ignore[arg-type]
        lambda: Quantize(8),  # type: ignore[arg-type]
        lambda: Quantize(Int),  # type: ignore[arg-type]
        lambda: Quantize(W8A8, ranges=Percentile),  # type: ignore[arg-type]
        lambda: Quantize(W8A8, ranges="mse"),  # type: ignore[arg-type]
        lambda: Quantize(W8A8, exclude="head"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        bad()


def test_a_forgotten_group_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"W4A16 takes its group: W4A16\(group=128\)"):
        Quantize(W4A16)  # type: ignore[arg-type]


def test_titles_are_for_people() -> None:
    assert Quantize(W8A8, ranges=MSE()).title == "Quantize to W8A8"
    assert Quantize(Int(4, PerGroup(32))).title == "Quantize to Int(bits=4)"
    assert Quantize(FixedPoint(256)).title == "Quantize to FixedPoint(factor=256)"


def test_what_a_sum_reads_takes_eight_bits_in_every_scheme() -> None:
    """No kernel adds in fewer, and the error of a stream stays for good."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(x + self.second(torch.relu(self.first(x))))
            y: Tensor = self.head(x)
            return y

    torch.manual_seed(0)
    model = Residual().eval()
    data = [torch.randn(8, 4, 6, 6) for _ in range(2)]
    Quantize(W2A2)(model, Context(Data(calibration=data), copy.deepcopy(model), copy.deepcopy(model)))
    assert model.first.input_format.bits == model.second.input_format.bits == 2
    assert model.second.output_format.bits == 8 and model.second.output_format.qmax == 255
    assert model.first.output_format is None
    assert model.stem.weight_format.bits == model.head.weight_format.bits == 8  # the ends


def test_a_convolution_before_a_pooling_has_a_grid_for_its_output() -> None:
    """Else it runs in floating point: no quantized layer follows that would put its output on a grid."""
    torch.manual_seed(0)
    pooled = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), *pooled).eval()
    data = [torch.randn(8, 3, 6, 6) for _ in range(2)]
    Quantize(W8A8)(model, Context(Data(calibration=data), copy.deepcopy(model), copy.deepcopy(model)))
    assert model[0].output_format is None
    assert model[2].output_format is not None and model[2].output_format.bits == 8


def test_rows_name_formats_ranges_and_what_they_clip() -> None:
    seen = torch.cat([torch.linspace(-1, 3, 7992), torch.full((8,), 30.0)]).view(-1, 8)
    model = mlp()
    context = Context(Data(calibration=[seen]), model, model)
    scheme = Scheme("own", Int(4), Int(8, PerTensor(), symmetric=False))
    row = Quantize(scheme, ranges=Percentile(99))(copy.deepcopy(model), context).layers[0]
    assert row.format == "int4 per channel, inputs uint8 per tensor"
    assert row.range is not None
    assert row.range == pytest.approx((-0.96, 2.96), abs=0.05)
    assert row.clipped == pytest.approx(0.02, abs=0.005)
    row = Quantize(W4A16(4, symmetric=False), correct=False)(copy.deepcopy(model), context).layers[0]
    assert (row.format, row.range, row.clipped) == ("uint4 per group of 4", None, None)
