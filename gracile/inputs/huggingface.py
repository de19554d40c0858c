"""Hugging Face models from a directory with a `config.json`; nothing is downloaded and no remote code runs."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from gracile.errors import MissingExtraError, ModelError


def load_huggingface(directory: Path) -> nn.Module:
    """The model of the class that the config names first under `architectures`, else AutoModel's; in eval mode.

    Raises MissingExtraError without transformers, ModelError where the directory holds no model that it can read.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "huggingface", f"Loading '{directory}'") from error
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"'{directory / 'config.json'}' cannot be read: {error}.") from error
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise ModelError(
            f"'{directory}' holds a {names[0]}, which transformers {transformers.__version__} does not have.\n"
            f"  Install a version that has it, or write a factory: package.module:factory."
        )
    try:
        model = kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever the file formats raise
        line = (str(error).strip().splitlines() or ["without a message"])[0]
        raise ModelError(f"transformers cannot load '{directory}': {type(error).__name__}: {line}") from error
    assert isinstance(model, nn.Module)
    return model.eval()
