"""Edits: structural changes of a model as plain data, applied by one function and replayed when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import ArtifactError
from gracile.nn import build_layer


@dataclass(frozen=True)
class Resize:
    """Cut parameters and buffers along axes, and mend the integers that a forward computes with.

    keep: "blocks.3.fc1.weight:0" (a parameter or buffer, and its axis) -> indices kept, ascending.
    attributes: "blocks.3.fc1.out_features" (a module, or an object it holds such as a config, and an attribute) -> new
        value.
    """

    keep: dict[str, tuple[int, ...]]
    attributes: dict[str, int | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Swap:
    """Replace a layer by another kind, built by `gracile.nn.build_layer(layer, config, old layer)`.

    name: the layer replaced, "blocks.3.fc1"; every parent that holds it gets the new one.
    layer: a class exported by `gracile.nn`, "QuantizedLinear".
    config: its settings, plain JSON data.
    """

    name: str
    layer: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remove:
    """Take a module out of the `nn.Sequential` or `nn.ModuleList` that holds it.

    name: "blocks.3". Where the modules there are numbered, those behind it move up: "blocks.4" is "blocks.3" then.
    """

    name: str


Edit = Resize | Swap | Remove


def apply(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Apply edits to the model in place, in order. Shared modules and tied tensors stay shared and tied."""
    for edit in edits:
        if isinstance(edit, Resize):
            _resize(model, edit)
        elif isinstance(edit, Remove):
            _remove(model, edit)
        else:
            _swap(model, edit)


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """An edit as plain JSON data, read back by `edit_from_json`."""
    if isinstance(edit, Swap):
        return {"edit": "Swap", "name": edit.name, "layer": edit.layer, "config": edit.config}
    if isinstance(edit, Remove):
        return {"edit": "Remove", "name": edit.name}
    keep = {key: list(indices) for key, indices in edit.keep.items()}
    attributes = {k: list(v) if isinstance(v, tuple) else v for k, v in edit.attributes.items()}
    return {"edit": "Resize", "keep": keep, "attributes": attributes}


def edit_from_json(data: dict[str, Any]) -> Edit:
    """The edit that `edit_to_json` wrote; raises ArtifactError for anything else."""
    try:
        if data["edit"] == "Swap":
            return Swap(str(data["name"]), str(data["layer"]), dict(data["config"]))
        if data["edit"] == "Remove":
            return Remove(str(data["name"]))
        if data["edit"] == "Resize":
            keep = {str(k): tuple(int(i) for i in v) for k, v in data["keep"].items()}
            attributes = {
                str(k): tuple(int(i) for i in v) if isinstance(v, list) else int(v)
                for k, v in data["attributes"].items()
            }
            return Resize(keep, attributes)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"An edit in the journal cannot be read: {error!r}.") from error
    raise ArtifactError(f"An edit in the journal is of an unknown kind: {data['edit']!r}.")


def _swap(model: nn.Module, edit: Swap) -> None:
    try:
        old = model.get_submodule(edit.name)
    except AttributeError as error:
        raise ArtifactError(f"Swap: the model ({type(model).__name__}) has no layer '{edit.name}'.") from error
    if old is model:
        raise ArtifactError("Swap: the model itself cannot be replaced, only a layer in it.")
    new = build_layer(edit.layer, edit.config, old)
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() gives a child held twice only once
            if child is old:
                setattr(parent, name, new)


def _remove(model: nn.Module, edit: Remove) -> None:
    path, _, key = edit.name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(f"Remove: the model ({type(model).__name__}) has no module '{path}'.") from error
    if not isinstance(parent, (nn.Sequential, nn.ModuleList)) or key not in parent._modules:
        raise ArtifactError(
            f"Remove: '{edit.name}' is not in an nn.Sequential or nn.ModuleList of the model ({type(model).__name__})."
        )
    numbered = list(parent._modules) == [str(i) for i in range(len(parent))]
    del parent._modules[key]
    if numbered:
        left = list(parent._modules.values())
        parent._modules.clear()
        parent._modules.update({str(i): module for i, module in enumerate(left)})


def _resize(model: nn.Module, edit: Resize) -> None:
    cuts: dict[int, tuple[Tensor, str, dict[int, tuple[int, ...]]]] = {}  # tied tensors have two names and one entry
    for key, indices in edit.keep.items():
        name, _, axis = key.rpartition(":")
        owner, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            tensor = module._parameters[attribute] if attribute in module._parameters else module._buffers[attribute]
        except (AttributeError, KeyError) as error:
            raise ArtifactError(f"Resize: the model ({type(model).__name__}) has no parameter '{name}'.") from error
        if not isinstance(tensor, Tensor) or not axis.isdecimal():
            raise ArtifactError(f"Resize: '{key}' does not name a parameter or buffer and its axis.")
        cuts.setdefault(id(tensor), (tensor, name, {}))[2][int(axis)] = indices
    for tensor, name, axes in cuts.values():
        cut = tensor
        for dimension, indices in axes.items():
            cut = _cut(name, cut, dimension, indices)
        _rebind(model, tensor, cut)
    for path, value in edit.attributes.items():
        _set_attribute(model, path, value)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            _relink_recurrent(module)


def _rebind(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever the model holds `old` as a parameter or buffer."""
    if old is new:
        return
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is old:
                    store[name] = new  # type: ignore[assignment]


def _cut(name: str, tensor: Tensor, axis: int, indices: tuple[int, ...]) -> Tensor:
    if axis >= tensor.ndim or not indices or min(indices) < 0 or max(indices) >= tensor.shape[axis]:
        raise ArtifactError(
            f"Resize: '{name}' has shape {tuple(tensor.shape)}, so axis {axis} cannot keep "
            f"{f'indices {min(indices)} to {max(indices)}' if indices else 'no index at all'}.\n"
            f"  The edits were made for another model: pass an instance built as the original was."
        )
    kept = tensor.detach().index_select(axis, torch.tensor(indices, device=tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(kept, requires_grad=tensor.requires_grad)
    return kept


def _set_attribute(model: nn.Module, path: str, value: int | tuple[int, ...]) -> None:
    """Set an integer on the module, or on an object that a module holds, named by a dotted path.

    Only integers, and tuples or lists of integers, that are there already, and in a configuration what is None: a
    journal can change nothing else.
    """
    if "__" in path:
        raise ArtifactError(f"Resize: '{path}' is not an attribute that can be resized.")
    owner_path, _, attribute = path.rpartition(".")
    owner: Any = model
    try:
        for part in filter(None, owner_path.split(".")):
            owner = owner[int(part)] if isinstance(owner, (list, tuple)) else getattr(owner, part)
        old = getattr(owner, attribute)
    except (AttributeError, ValueError, IndexError) as error:
        raise ArtifactError(f"Resize: the model ({type(model).__name__}) has no attribute '{path}'.") from error
    integers = old if isinstance(old, (list, tuple)) else (old,)
    if old is None and not isinstance(owner, nn.Module):
        integers = ()
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in integers):
        raise ArtifactError(f"Resize: '{path}' is not an integer, or a list of integers, and cannot be resized.")
    setattr(owner, attribute, list(value) if isinstance(old, list) and isinstance(value, tuple) else value)


def _relink_recurrent(module: nn.RNNBase) -> None:
    """`nn.RNNBase` keeps a second list of its weights; point it at the present ones."""
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module.flatten_parameters()
