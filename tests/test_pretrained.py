"""Configs that say the sizes of a cut model: Hugging Face's own save and load are the other route."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.arange(18).reshape(2, 9)}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return made(transformers.BertModel, transformers.BertConfig(vocab_size=40, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)
    return made(transformers.LlamaForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return made(transformers.GPT2Model, config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_channels=3
    )
    return made(transformers.ResNetModel, config)


def made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    return model


def cut(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> gc.Result:
    uniform = {"allocation": gc.allocate.Uniform()} if not isinstance(settings["pattern"], gc.Layers) else {}
    return gc.compress(model, gc.Prune(**({"fraction": 0.25} | uniform | settings)), gc.Data(calibration=[batch]))


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


def notes(result: gc.Result) -> list[str]:
    return [note for note in result.report.steps[-1].notes if "save_pretrained" in note]


@pytest.mark.parametrize(
    ("make", "settings", "changed"),
    [
        (bert, {"pattern": gc.Channels()}, {"intermediate_size": 48}),
        (llama, {"pattern": gc.Channels()}, {"hidden_size": 24, "intermediate_size": 48}),
        (llama, {"pattern": gc.Heads(), "fraction": 0.5}, {"num_attention_heads": 1, "num_key_value_heads": 1}),
        (llama, {"pattern": gc.Layers(), "fraction": 0.34}, {"num_hidden_layers": 2}),
        (gpt2, {"pattern": gc.Channels()}, {"n_inner": 96}),  # None before: four times the width
    ],
)
def test_a_cut_that_the_config_can_say_survives_save_pretrained(
    make: Any, settings: dict[str, Any], changed: dict[str, int], tmp_path: Path
) -> None:
    model = make()
    before = model.config.to_dict()
    result = cut(model, IDS, **settings)
    assert model.config.to_dict() == before, "the model given is not touched"
    for name, value in changed.items():
        assert getattr(result.model.config, name) == value
    assert len(notes(result)) == 1 and "keeps the cut model" in notes(result)[0]
    result.model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert torch.equal(answer(again, IDS), answer(result.model, IDS))


def test_the_artifact_rebuilds_the_config_too(tmp_path: Path) -> None:
    result = cut(gpt2(), IDS, pattern=gc.Channels())
    result.save(tmp_path / "slim")
    again = gc.load(tmp_path / "slim", gpt2())
    assert again.config.to_dict() == result.model.config.to_dict()  # type: ignore[union-attr,operator]
    assert torch.equal(answer(again, IDS), answer(result.model, IDS))


def test_lists_of_sizes_change_together_with_their_equals(tmp_path: Path) -> None:
    """The first stage's width is the embedding's: one of the two alone would need a projection between them."""
    result = cut(resnet(), PIXELS, pattern=gc.Channels(), exclude=("encoder.stages.2*",))
    assert result.model.config.hidden_sizes == [12, 24, 64]  # type: ignore[union-attr]
    assert result.model.config.embedding_size == 12  # type: ignore[union-attr]
    result.model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = transformers.ResNetModel.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again, PIXELS), answer(result.model, PIXELS))


def test_widths_that_differ_from_layer_to_layer_are_gracile_s_to_load(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():  # so that the ranks differ
        model.get_parameter("encoder.layer.0.intermediate.dense.weight").mul_(3)
    result = cut(model, IDS, pattern=gc.Channels(), allocation=gc.allocate.GlobalRank())
    widths = {layer.intermediate.dense.out_features for layer in result.model.encoder.layer}  # type: ignore[union-attr]
    assert len(widths) > 1
    assert len(notes(result)) == 1 and "gracile.load" in notes(result)[0]
    assert result.model.config.intermediate_size == 64  # type: ignore[union-attr]
    result.save(tmp_path / "slim")
    assert torch.equal(answer(gc.load(tmp_path / "slim", bert()), IDS), answer(result.model, IDS))


def test_a_model_within_another_is_found() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"encoder": bert()})
            self.head = nn.Linear(32, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.parts["encoder"](input_ids)[0].mean(1))
            return out

    model = Wrapped().eval()
    result = gc.compress(
        model,
        gc.Prune(
            0.25, pattern=gc.Channels(), allocation=gc.allocate.Uniform(), exclude=("head", "*embeddings*", "*pooler*")
        ),
        gc.Data(calibration=[IDS["input_ids"]]),
    )
    inner = result.model.parts["encoder"]  # type: ignore[index]
    assert inner.config.intermediate_size == 48 and "'parts.encoder'" in notes(result)[0]
    again = type(inner)(copy.deepcopy(inner.config)).eval()
    again.load_state_dict(inner.state_dict())
    assert torch.equal(answer(again, IDS), answer(inner, IDS))


def test_models_without_a_config_and_steps_that_change_no_size_are_told_nothing() -> None:
    plain = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    result = gc.compress(plain, gc.Prune(0.25, pattern=gc.Channels()), gc.Data(calibration=[torch.randn(4, 9)]))
    assert not notes(result)
    result = gc.compress(bert(), gc.Prune(0.25), gc.Data(calibration=[IDS]))
    assert not notes(result)


def test_a_model_cut_before_needs_no_data_for_a_step_that_needs_none() -> None:
    cut_before = cut(bert(), IDS, pattern=gc.Channels()).model
    result = gc.compress(cut_before, gc.Prune(0.25))
    assert not notes(result) and result.report.steps[-1].numbers["sparsity"] == pytest.approx(0.25, abs=0.01)
