"""Layers with one weight: the same codes in both, stored once, trained as one; or left alone with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.evaluate.size import state_bytes
from gracile.nn import begin_training, end_training
from gracile.stats.match import layers_of_few_bits


class LanguageModel(nn.Module):
    """Logits [n, 5, 20] of tokens [n, 5], by the table that embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embed(ids))))
        return logits


class OneKernel(nn.Module):
    """Two convolutions with one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv1d(4, 8, 1), nn.Conv1d(4, 8, 1)
        self.other.weight = self.conv.weight
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last((self.conv(x) + self.other(x)).mean(2))
        return out


def language_model() -> Any:
    torch.manual_seed(0)
    return LanguageModel().eval()


def tokens(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (4, 5), generator=generator) for _ in range(count)]


def compress(model: nn.Module, step: gc.Step) -> gc.Result:
    return gc.compress(model, step, gc.Data(calibration=tokens()))


def rows_of(result: gc.Result, action: str) -> dict[str, str | None]:
    return {row.name: row.reason for row in result.report.steps[0].layers if row.action == action}


@pytest.mark.parametrize("scheme", [gc.W8A8, gc.W8A16, gc.W4A16(group=4), gc.W4A8, gc.formats.NF4()], ids=str)
def test_one_weight_is_stored_once_and_loaded_as_one(scheme: Any, tmp_path: Path) -> None:
    result = compress(language_model(), gc.Quantize(scheme, correct=False))
    model: Any = result.model
    assert model.head.weight_codes is model.embed.weight_codes and model.head.weight_scale is model.embed.weight_scale
    assert rows_of(result, "quantized")["head"] == "one weight with 'embed'"
    codes, scale = model.embed.weight_codes, model.embed.weight_scale
    rest = sum(
        t.nbytes for name, t in model.state_dict().items() if "weight_codes" not in name and "weight_s" not in name
    )
    rest += sum(t.nbytes for t in (model.mix.weight_codes, model.mix.weight_scale))
    assert state_bytes(model) == codes.nbytes + scale.nbytes + rest
    result.save(tmp_path / "slim")
    loaded: Any = gc.load(tmp_path / "slim", language_model())
    assert loaded.head.weight_codes is loaded.embed.weight_codes
    assert torch.equal(loaded(tokens()[0]), model(tokens()[0]))


def test_both_take_what_the_scheme_has_for_its_ends() -> None:
    model: Any = compress(language_model(), gc.Quantize(gc.W4A8, correct=False)).model
    assert model.embed.weight_format.bits == model.head.weight_format.bits == 8 and model.mix.weight_format.bits == 4
    assert model.head.input_format.bits == 8


def test_it_is_trained_as_one() -> None:
    model: Any = compress(language_model(), gc.Quantize(gc.W4A16(group=4), correct=False)).model
    x = tokens()[0]
    before = model(x).detach()
    begin_training(model, language_model())
    assert model.head.weight is model.embed.weight
    assert model.head.weight_scale_change is model.embed.weight_scale_change
    assert len([p for p in model.parameters() if p.shape == (20, 8)]) == 1
    torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x).detach()
    end_training(model)
    assert model.head.weight_codes is model.embed.weight_codes and not dict(model.named_parameters()).get("head.weight")
    torch.testing.assert_close(model(x), trained)
    assert not torch.equal(trained, before)


def test_a_solver_rounds_the_others() -> None:
    result = compress(language_model(), gc.Quantize(gc.W4A16(group=4), solver=gc.solvers.GPTQ(), correct=False))
    reasons = {name: str(reason) for name, reason in rows_of(result, "quantized").items()}
    assert "unfold" in reasons["embed"] and "tied" in reasons["head"] and "GPTQ" in reasons["mix"]
    model: Any = result.model
    assert model.head.weight_codes is model.embed.weight_codes


def test_the_scales_of_its_channels_are_not_the_head_s_to_correct() -> None:
    model = language_model()
    model.head.bias = nn.Parameter(torch.zeros(20))
    result: Any = compress(model, gc.Quantize(gc.Int(3), correct=False)).model
    assert layers_of_few_bits(result, model) == ["mix"]


def test_smoothing_leaves_it_as_it_is() -> None:
    step = gc.Quantize(gc.W8A8, equalize=gc.equalize.SmoothQuant(), correct=False)
    model: Any = compress(language_model(), step).model
    assert model.head.weight_codes is model.embed.weight_codes and model.head.input_multiplier is None


def test_without_the_other_it_stays_in_floating_point() -> None:
    result = compress(language_model(), gc.Quantize(gc.W8A16, exclude=("head",), correct=False))
    assert rows_of(result, "skipped") == {"embed": "shares its weight with 'head', which is not selected"}
    model: Any = result.model
    assert model.head.weight is model.embed.weight


def test_convolutions_with_one_kernel_are_left_alone() -> None:
    torch.manual_seed(0)
    data = gc.Data(calibration=[torch.randn(4, 4, 6) for _ in range(3)])
    result = gc.compress(OneKernel().eval(), gc.Quantize(gc.W8A16, correct=False), data)
    assert rows_of(result, "skipped") == {
        "conv": "shares its weight with 'other', a Conv1d",
        "other": "shares its weight with 'conv', a Conv1d",
    }


def test_they_choose_one_format_of_several() -> None:
    step = gc.Quantize(to=gc.Bytes(0.4), options=(gc.W8A16, gc.W4A16(group=4)), correct=False)
    result = compress(language_model(), step)
    assert not rows_of(result, "skipped")
    layers = [result.model.get_submodule(name) for name in ("embed", "head")]
    assert layers[0].weight_format == layers[1].weight_format
    assert layers[0].weight_codes is layers[1].weight_codes


@pytest.mark.parametrize("target", [gc.OnnxRuntime(), gc.OpenVINO()], ids=lambda target: target.name)
@pytest.mark.parametrize("scheme", [gc.W8A16, gc.W4A16(group=4)], ids=str)
def test_exported_with_parity(scheme: Any, target: gc.targets.Target, tmp_path: Path) -> None:
    pytest.importorskip(target.name)
    model, x = compress(language_model(), gc.Quantize(scheme, correct=False)).model, tokens()[0]
    found = target.run(target.export(model, x, tmp_path / f"model{target.suffix}"), x)
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-3, atol=1e-4)
