"""A model or data by name, as the command line takes them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gracile.artifact import JOURNAL, load
from gracile.data import Data
from gracile.errors import ConfigError, DataError, ModelError
from gracile.inputs.factories import EXAMPLES, build, is_factory_name
from gracile.inputs.huggingface import load_huggingface

#: Files of other frameworks, and what is to be said of them.
OTHER_FORMATS = {
    ".keras": "A Keras model",
    ".h5": "A Keras model",
    ".onnx": "An ONNX model",
    ".pt": "A PyTorch file",
    ".pth": "A PyTorch file",
    ".bin": "A PyTorch file",
    ".ckpt": "A checkpoint",
    ".safetensors": "A file of weights",
}


def load_model(name: str, class_name: str | None = None) -> nn.Module:
    """The model that a name stands for.

    name: `package.module:factory` or `path/to/file.py:factory`; a directory that Gracile saved; or a directory with a
        Hugging Face config.
    class_name: factory of a fresh model to load a saved directory into, where its class cannot be built by itself.

    Raises ConfigError where the name stands for nothing, ModelError or ArtifactError where the model cannot be had.
    """
    path = Path(name)
    if class_name is not None and not (path / JOURNAL).is_file():
        raise ConfigError(f"A class to load into goes with a directory that Gracile saved, and '{name}' is none.")
    if path.is_dir():
        if (path / JOURNAL).is_file():
            fresh = build(class_name, nn.Module, ModelError) if class_name is not None else None
            return load(path, fresh)
        if (path / "config.json").is_file():
            return load_huggingface(path)
        raise ConfigError(
            f"The directory '{name}' has neither a {JOURNAL} (Gracile's) nor a config.json (Hugging Face's)."
        )
    if path.suffix in OTHER_FORMATS:
        raise ConfigError(_not_supported(path))
    if is_factory_name(name):
        model = build(name, nn.Module, ModelError)
        assert isinstance(model, nn.Module)
        return model
    raise ConfigError(
        f"'{name}' names no model.\n  Write {EXAMPLES}, a directory that Gracile saved, or one with a Hugging Face "
        f"config.json."
    )


def load_data(name: str) -> Data:
    """The `Data` that a named factory returns; raises ConfigError or DataError."""
    if Path(name).exists() and not is_factory_name(name):
        raise ConfigError(
            f"'{name}' is a file or directory; data are named by the function that makes them: {EXAMPLES}."
        )
    data = build(name, Data, DataError)
    assert isinstance(data, Data)
    return data


def _not_supported(path: Path) -> str:
    if not path.exists():
        return f"There is no file '{path}'."
    what = OTHER_FORMATS[path.suffix]
    if path.suffix in (".keras", ".h5", ".onnx"):
        return (
            f"{what} ('{path}') cannot be read yet; this version takes PyTorch models only.\n"
            f"  Write a factory that returns it as a PyTorch model: {EXAMPLES}."
        )
    return (
        f"{what} ('{path}') holds weights and not the model they belong to.\n"
        f"  Write a factory that builds the model and loads them: {EXAMPLES}."
    )
