"""Saving and loading a compressed model: weights in safetensors, structure as a journal of edits, no pickle."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gracile.errors import ArtifactError, GracileError
from gracile.files import sha256_file, sha256_json, write_directory
from gracile.surgery import Edit, apply, edit_from_json, edit_to_json

SCHEMA = 1
WEIGHTS = "model.safetensors"
JOURNAL = "compression.json"


def save_model(model: nn.Module, directory: Path, edits: Sequence[Edit], provenance: dict[str, Any]) -> None:
    """Write `model.safetensors` and `compression.json` into an existing directory.

    edits: all edits made since the model was built by its class, in order. provenance: JSON data kept beside them
    (recipe, seed, versions, ...), not needed to load. Raises OSError where the disk refuses.
    """
    tensors, tied = _unique_tensors(model)
    try:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    cls = type(model)
    journal = {
        "schema": SCHEMA,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "edits": [edit_to_json(edit) for edit in edits],
        "tied": tied,
        "sha256": {WEIGHTS: sha256_file(directory / WEIGHTS)},
        "provenance": provenance,
    }
    journal["checksum"] = sha256_json(journal)
    (directory / JOURNAL).write_text(json.dumps(journal, indent=1, sort_keys=True) + "\n")


def save(
    model: nn.Module, directory: str | Path, edits: Sequence[Edit] = (), provenance: dict[str, Any] | None = None
) -> None:
    """Save a model with its journal of edits as a directory, atomically; an older artifact there stays until then."""
    write_directory(directory, lambda temporary: save_model(model, temporary, edits, provenance or {}))


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The saved model: the edits replayed on `model`, the weights loaded bit for bit; returns it in eval mode.

    model: a fresh instance of the original class, built as the original was; it is changed in place. None: the class
    named in the artifact is imported and built without arguments; for a Hugging Face model, from the config saved.

    Raises ArtifactError for anything missing, damaged, truncated, newer than this version, or made for another class.
    """
    directory = Path(directory)
    journal = read_journal(directory)
    if model is None:
        model = _build(journal, directory)
    elif not isinstance(model, nn.Module):
        raise ArtifactError(f"load: expected a model instance (nn.Module), got {type(model).__name__}.")
    load_into(model, directory)
    return model.eval()


def load_into(model: nn.Module, directory: str | Path, applied: int = 0) -> dict[str, Any]:
    """Bring a model to the saved state, its modes aside; returns the artifact's journal.

    applied: how many of the saved edits, the first ones, the model has already.
    """
    directory = Path(directory)
    journal = read_journal(directory)
    tensors = _read_weights(directory, journal)
    saved_class = journal["class"].rpartition(":")[2].rpartition(".")[2]
    if type(model).__name__ != saved_class:
        raise ArtifactError(
            f"'{directory}' holds a {saved_class}, and was given a {type(model).__name__} to load into.\n"
            f"  Pass a fresh instance of {journal['class']}."
        )
    edits = tuple(edit_from_json(edit) for edit in journal["edits"])
    try:
        apply(model, edits[applied:])
    except GracileError:
        raise
    except Exception as error:
        raise ArtifactError(f"'{directory}': the edits do not fit a {type(model).__name__}: {error}.") from error
    _fill(model, tensors, journal, directory)
    model.gracile_edits = edits  # type: ignore[assignment]  # a further compression goes on from them
    return journal


def read_journal(directory: str | Path) -> dict[str, Any]:
    """The checked content of an artifact's `compression.json`."""
    path = Path(directory) / JOURNAL
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"'{directory}' is not a Gracile artifact: it has no {JOURNAL}.") from None
    except NotADirectoryError:
        raise ArtifactError(f"'{directory}' is not a directory; an artifact is one.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"'{path}' cannot be read: {error}.\n  The file is damaged; restore it from a copy."
        ) from error
    if not isinstance(journal, dict) or not isinstance(journal.get("schema"), int):
        raise ArtifactError(f"'{path}' is not a journal of edits.")
    if journal["schema"] > SCHEMA:
        raise ArtifactError(
            f"'{path}' was written by a newer Gracile (schema {journal['schema']}, this one reads up to {SCHEMA}).\n"
            f"  Upgrade: pip install -U gracile"
        )
    content = {key: value for key, value in journal.items() if key != "checksum"}
    if journal.get("checksum") != sha256_json(content):
        raise ArtifactError(f"'{path}' does not match its own checksum: it was changed or damaged.")
    types = {"class": str, "edits": list, "tied": dict, "sha256": dict}
    if any(not isinstance(journal.get(key), kind) for key, kind in types.items()):
        raise ArtifactError(f"'{path}' lacks one of {', '.join(types)}.")
    return journal


def _read_weights(directory: Path, journal: dict[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        raise ArtifactError(f"'{directory}' has no {WEIGHTS}.")
    if sha256_file(path) != journal["sha256"].get(WEIGHTS):
        raise ArtifactError(f"'{path}' does not match its checksum: it is truncated, damaged or from another artifact.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}.") from error


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State tensors by name, each stored once, and the further names of tied ones."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"The model keeps extra state under '{name}' that is not a tensor; it cannot be saved.")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, tied


def _fill(model: nn.Module, tensors: dict[str, Tensor], journal: dict[str, Any], directory: Path) -> None:
    state = dict(tensors)
    for name, source in journal["tied"].items():
        if not isinstance(source, str) or source not in tensors:
            raise ArtifactError(f"'{directory}': '{name}' is tied to '{source}', which is missing.")
        state[name] = tensors[source]
    own = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name in own and own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = [line.strip() for line in str(error).splitlines()][1:2]  # the first of the tensors that do not fit
        raise ArtifactError(
            f"The weights in '{directory}' do not fit this {type(model).__name__}.\n  {' '.join(reason)}\n"
            f"  Pass an instance built with the same arguments as the original."
        ) from error
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, source in journal["tied"].items():
        if name in buffers and source in buffers:
            layer, _, key = name.rpartition(".")
            model.get_submodule(layer)._buffers[key] = buffers[source]


def _build(journal: dict[str, Any], directory: Path) -> nn.Module:
    module_name, _, qualname = journal["class"].partition(":")
    advice = f"Pass an instance: gracile.load('{directory}', {qualname}(...))."
    try:
        cls: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtifactError(f"The class {journal['class']} cannot be imported here: {error}.\n  {advice}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArtifactError(f"{journal['class']} is not a model class.\n  {advice}")
    config = journal.get("provenance", {}).get("huggingface_config")
    try:
        with torch.random.fork_rng(devices=[]):
            if isinstance(config, dict) and hasattr(cls, "config_class"):
                return cls(cls.config_class.from_dict(config))
            return cls()
    except Exception as error:
        raise ArtifactError(f"{journal['class']} cannot be built by itself: {error}.\n  {advice}") from error
