"""Quantize on recurrent nets: what is encoded, saved, exported and trained, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.errors import ConfigError, DataError
from gracile.formats import Int, MidRise, PerGroup
from gracile.nn import QuantizedRecurrent


class Speech(nn.Module):
    """Frames through a recurrent layer, the last state to classes."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.rnn = kind(8, 16, num_layers=2, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


def net(kind: type[nn.RNNBase] = nn.GRU) -> Speech:
    torch.manual_seed(0)
    return Speech(kind).eval()


def frames(seed: int = 1, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 10, 8, generator=generator) for _ in range(count)]


def quantized(step: gc.Quantize, kind: type[nn.RNNBase] = nn.GRU) -> gc.Result:
    return gc.compress(net(kind), step, gc.Data(calibration=frames()))


STEPS = [
    gc.Quantize(gc.W8A16),
    gc.Quantize(gc.W8A8),
    gc.Quantize(gc.W4A16(group=8), solver=gc.solvers.GPTQ(beam=1, rounds=1)),
    gc.Quantize(Int(4, PerGroup(16), symmetric=False)),
    gc.Quantize(gc.formats.NF4(PerGroup(16))),
]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_recurrent_layers_are_encoded_saved_and_loaded(
    step: gc.Quantize, kind: type[nn.RNNBase], tmp_path: Path
) -> None:
    result, x = quantized(step, kind), frames(9, 1)[0]
    assert isinstance(result.model.rnn, QuantizedRecurrent) and isinstance(result.model.rnn, kind)
    (row,) = [row for row in result.report.steps[0].layers if row.name == "rnn"]
    assert row.action == "quantized" and row.kind == kind.__name__ and row.bits is not None and row.bits < 12
    assert row.reason is not None and "weights only" in row.reason
    result.save(tmp_path / "slim")
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(gc.load(tmp_path / "slim", net(kind))(x), expected)
        off = float((expected - net(kind)(x)).abs().max())
    assert 0 < off < 0.2


def test_inputs_that_are_rounded_as_they_come_are_an_lstm_s_alone(tmp_path: Path) -> None:
    step, x = gc.Quantize(gc.formats.W8A8Dynamic), frames(9, 1)[0]
    for kind, dynamic in ((nn.LSTM, True), (nn.GRU, False)):
        result = gc.compress(net(kind), step, gc.Data())  # needs no data
        (row,) = [row for row in result.report.steps[0].layers if row.name == "rnn"]
        assert result.model.rnn.dynamic == dynamic == ("as they come" in str(row.format))
        assert ("weights only" in str(row.reason)) != dynamic
        result.save(tmp_path / kind.__name__)
        with torch.no_grad():
            assert torch.equal(gc.load(tmp_path / kind.__name__, net(kind))(x), result.model(x))
    grouped = gc.Scheme("grouped", Int(8, PerGroup(8)), step.scheme.input)  # type: ignore[union-attr]
    assert not gc.compress(net(nn.LSTM), gc.Quantize(grouped), gc.Data()).model.rnn.dynamic


@pytest.mark.parametrize("target", [gc.OnnxRuntime(), gc.OpenVINO()], ids=lambda target: target.name)
def test_runtimes_get_the_decoded_weights(target: gc.targets.Target, tmp_path: Path) -> None:
    pytest.importorskip(target.name)
    result, x = quantized(gc.Quantize(gc.W4A16(group=8))), frames(9, 1)[0]
    evidence = gc.export(result.model, target, tmp_path / f"model{target.suffix}", x)
    assert evidence.parity is not None and evidence.parity.max_error < 1e-3
    assert any("decoded in the file" in note for note in evidence.notes)
    assert isinstance(result.model.rnn, QuantizedRecurrent)  # the model itself is as it was


def test_rounded_to_its_nearest_code_per_gate_and_unit() -> None:
    model, found = net(nn.LSTM), quantized(gc.Quantize(gc.W8A16), nn.LSTM).model
    assert found.rnn.encoded["weight_ih_l0"].weight_scale.shape == (4 * 16,)
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"):
        before, after = getattr(model.rnn, name).detach(), getattr(found.rnn, name)
        assert float((before - after).abs().max()) <= float(before.abs().max()) / 127
    assert torch.equal(model.rnn.bias_ih_l0, found.rnn.bias_ih_l0)


def test_mid_rise_scales_are_those_of_least_error() -> None:
    """Against all scales between a tenth and the whole of the one that reaches the largest weight, row by row."""
    model = net()
    found = quantized(gc.Quantize(MidRise(2), exclude=("head",))).model.rnn
    for name in ("weight_ih_l0", "weight_hh_l1"):
        weight = getattr(model.rnn, name).detach()
        error = (getattr(found, name) - weight).square().sum(1)
        full = weight.abs().amax(1, keepdim=True) / 1.5
        tried = []
        for scale in (full * share for share in torch.linspace(0.1, 1, 200)):
            levels = torch.stack([scale * level for level in (-1.5, -0.5, 0.5, 1.5)])  # [4, rows, 1]
            tried.append((levels - weight).square().amin(0).sum(1))
        assert bool((error <= 1.01 * torch.stack(tried).amin(0)).all())  # in 57 steps
        assert float(error.sum()) < 0.8 * float(tried[-1].sum())


def test_two_bits_recover_by_distillation() -> None:
    model, batches = net(), frames(3, 8)
    data = gc.Data(calibration=frames(), train=batches)
    distil = gc.Distill(
        losses=(gc.losses.MeanSquaredError(),), epochs=8, optimizer=gc.steps.AdamW(5e-3), held_out=0.125
    )
    plain = gc.compress(model, gc.Quantize(Int(2)), data)
    trained = gc.compress(model, gc.Recipe(gc.Quantize(Int(2)), distil), data)
    x = torch.cat(frames(9))
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().mean()) for net in (plain.model, trained.model)]
    assert errors[1] < 0.5 * errors[0]
    assert isinstance(trained.model.rnn, QuantizedRecurrent)


def test_pruned_weights_stay_zero_also_when_a_saved_model_trains(tmp_path: Path) -> None:
    model = net()
    zeros = torch.rand(model.rnn.weight_hh_l0.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    model.rnn.weight_hh_l0.data.masked_fill_(zeros, 0.0)
    gc.compress(model, gc.Quantize(Int(2)), gc.Data(calibration=frames())).save(tmp_path / "slim")
    loaded = gc.load(tmp_path / "slim", model)
    distil = gc.Distill(losses=(gc.losses.MeanSquaredError(),), epochs=3, optimizer=gc.steps.AdamW(2e-2), held_out=0.0)
    trained = gc.compress(loaded, distil, gc.Data(train=frames(3, 8)), teacher=net()).model
    assert not bool(trained.rnn.weight_hh_l0[zeros].any())
    rounded = loaded.rnn.weight_ih_l0 == 0
    assert bool((trained.rnn.weight_ih_l0[rounded] != 0).any())  # zeros that rounding made may change


def test_a_model_of_nothing_else() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x)[0]
            return y

    result = gc.compress(Only().eval(), gc.Quantize(gc.W8A8), gc.Data(calibration=frames()))
    assert isinstance(result.model.rnn, QuantizedRecurrent)
    step = gc.Quantize(to=gc.Bytes(0.45), options=(gc.W8A8, gc.formats.W2A8))
    result = gc.compress(Only().eval(), step, gc.Data(calibration=frames()))
    assert isinstance(result.model.rnn, QuantizedRecurrent)
    assert next(iter(result.model.rnn.encoded.values())).weight_format.bits == 2  # type: ignore[union-attr]


def test_what_cannot_be_encoded_is_refused_before_any_change() -> None:
    model = net()
    model.rnn.weight_hh_l1.data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"weight_hh_l1.*rnn.*NaN"):
        gc.Quantize(Int(8))(model, Context(gc.Data(calibration=frames()), net(), net()))
    assert isinstance(model.rnn, nn.GRU) and isinstance(model.head, nn.Linear)
    pruned = net()
    pruned.rnn.weight_hh_l0.data[0, 0] = 0.0
    with pytest.raises(ConfigError, match=r"rnn.weight_hh_l0.*pruned, and MidRise has no zero"):
        gc.Quantize(MidRise(3))(pruned, Context(gc.Data(calibration=frames()), net(), net()))
    assert isinstance(pruned.rnn, nn.GRU)
    with pytest.raises(ConfigError, match="axis=5"):
        gc.compress(net(), gc.Quantize(Int(8, gc.formats.PerChannel(5)), exclude=("head",)), gc.Data())


def test_a_second_step_leaves_it_alone() -> None:
    once = quantized(gc.Quantize(gc.W8A16, exclude=("head",)))
    twice = gc.compress(once.model, gc.Quantize(gc.W8A16), gc.Data(calibration=frames()))
    skipped = [(row.name, row.kind, row.reason) for row in twice.report.steps[0].layers if row.action == "skipped"]
    assert skipped == [("rnn", "QuantizedGRU", "quantized already")]
    again = gc.compress(once.model, gc.Quantize(gc.W8A16, exclude=("rnn",)), gc.Data(calibration=frames()))
    assert not again.report.skipped
