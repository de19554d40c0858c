"""Hugging Face directories: the class of the config, the weights saved there, and clear words where it fails."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gracile.errors import MissingExtraError, ModelError
from gracile.inputs import load_model


@pytest.fixture
def bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def test_the_model_is_the_one_that_was_saved(bert):
    directory, saved = bert
    loaded = load_model(str(directory))
    assert type(loaded) is type(saved)
    assert not loaded.training
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, saved(tokens).logits, rtol=1e-5, atol=1e-7)


def test_an_architecture_that_there_is_not(bert):
    directory, _ = bert
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTelepathy"]}))
    with pytest.raises(ModelError, match="BertForTelepathy"):
        load_model(str(directory))


def test_a_config_without_weights_is_not_downloaded(bert):
    directory, _ = bert
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(directory))


@pytest.mark.parametrize("text", ["{", "[]", '"bert"'])
def test_a_damaged_config(tmp_path, text):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"gracile\[huggingface\]"):
        load_model(str(tmp_path))
