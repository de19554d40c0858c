"""A model's configuration, made to say its sizes after a cut, where it can: what `from_pretrained` builds it from."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gracile.graph.values import tensors_in
from gracile.modes import unchanged
from gracile.sharing import share_parameters
from gracile.surgery import Resize

Shapes = dict[str, tuple[int, ...]]


def configured_sizes(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[list[Resize], list[str]]:
    """Edits of the configurations of a cut model that make them say its sizes, and notes on what they can say.

    Looked at are the outermost modules with a `config` (that has `to_dict`) and a `save_pretrained`. One whose class,
    given its config, has other shapes than it has itself gets whole numbers in the config that were seen to lead to its
    shapes; then it is built anew, given its weights, and must answer as it does now. Where none do, nothing is changed
    and a note says so: such a model is saved and loaded by Gracile. Nothing is said of configs that are right already.

    run: calls a model on a batch. The model is not changed.
    """
    edits, notes = [], []
    for path, module in _outermost(model):
        wanted = _shapes(module)
        if _built_shapes(type(module), module.config) in (None, wanted):
            continue
        found = _search(type(module), module.config, wanted, _lengths(module))
        name = f"the config of '{path}'" if path else "its config"
        if found is not None and _answers_alike(model, path, found, run):
            prefix = f"{path}.config." if path else "config."
            edits.append(Resize({}, {prefix + key: value for key, value in _changes(module.config, found).items()}))
            changed = ", ".join(f"{key} {value}" for key, value in _changes(module.config, found).items())
            notes.append(f"save_pretrained keeps the cut model: {name} now says {changed}.")
        else:
            notes.append(
                f"save_pretrained cannot keep the cut model: {name} has no words for layers of such sizes. "
                f"Save it with result.save(...), and load it with gracile.load(...)."
            )
    return edits, notes


def _outermost(model: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)) and callable(getattr(model, "save_pretrained", None)):
        yield path, model
        return
    for name, child in model.named_children():
        yield from _outermost(child, f"{path}.{name}" if path else name)


def _search(kind: type, config: Any, wanted: Shapes, lengths: dict[str, int]) -> Any:
    """A config from which `kind` has the shapes wanted, or None.

    Changed is one number at a time, or all that are equal; each change must bring more shapes to agree.
    """
    built = _built(kind, config)
    one_by_one = any(path[-1].isdecimal() for path, _ in _numbers(config))
    if built is not None and not one_by_one and not _alike(_shapes(built), wanted):
        return None
    while built is not None and _shapes(built) != wanted:
        left = _mismatches(_shapes(built), wanted)
        best = None
        for changes in _candidates(config, _pairs(built, wanted, lengths)):
            trial = _changed(config, changes)
            shapes = _built_shapes(kind, trial) if trial is not None else None
            if shapes is not None and _mismatches(shapes, wanted) < left:
                left, best = _mismatches(shapes, wanted), trial
        if best is None:
            return None
        config, built = best, _built(kind, best)
    return config


def _candidates(config: Any, pairs: set[tuple[int, int]]) -> list[dict[tuple[str, ...], int]]:
    """Changes to try for sizes that are to become others, (old, new), each once.

    Of all numbers that are such a size; and of one that is, divides it, is a multiple of it, or is left to the config's
    class (None).
    """
    numbers = dict(_numbers(config))
    found = [{key: new for key, value in numbers.items() if value == old} for old, new in sorted(pairs)]
    for old, new in sorted(pairs):
        for key, value in numbers.items():
            scaled = _scaled(value, old, new) if value is not None else new
            if scaled is not None:
                found.append({key: scaled})
    return [changes for i, changes in enumerate(found) if changes and changes not in found[:i]]


def _answers_alike(model: nn.Module, path: str, config: Any, run: Callable[[nn.Module], Any]) -> bool:
    """Whether the module, built from the config with the weights it has, makes the model answer as it does."""
    module = model.get_submodule(path)
    try:
        fresh: nn.Module = type(module)(copy.deepcopy(config))  # type: ignore[call-arg]
        fresh.load_state_dict(module.state_dict())
        parameter = next(module.parameters())
        fresh.to(parameter.device, parameter.dtype)
        for mine, its in zip(fresh.modules(), module.modules()):
            mine.training = its.training
        whole = fresh
        if path:
            whole = share_parameters(model)
            owner, _, name = path.rpartition(".")
            setattr(whole.get_submodule(owner), name, fresh)
        with torch.no_grad(), unchanged(model), unchanged(fresh):
            expected, found = (list(tensors_in(run(net))) for net in (model, whole))
    except Exception:  # building is the model's own code, which may refuse for any reason
        return False
    return len(expected) == len(found) and all(_close(a, b) for a, b in zip(expected, found))


def _close(a: Tensor, b: Tensor) -> bool:
    """The same kernels on the same numbers: equal, up to how a layout makes them round."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _built(kind: type, config: Any) -> nn.Module | None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            module = kind(copy.deepcopy(config))
    except Exception:  # sizes that the class refuses, or a class that needs more than its config
        return None
    return module if isinstance(module, nn.Module) else None


def _built_shapes(kind: type, config: Any) -> Shapes | None:
    built = _built(kind, config)
    return _shapes(built) if built is not None else None


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _lengths(module: nn.Module) -> dict[str, int]:
    lists = (nn.ModuleList, nn.Sequential)
    return {name: len(child) for name, child in module.named_modules() if isinstance(child, lists)}


def _mismatches(shapes: Shapes, wanted: Shapes) -> int:
    return sum(shapes.get(name) != wanted.get(name) for name in shapes.keys() | wanted.keys())


def _pairs(built: nn.Module, wanted: Shapes, lengths: dict[str, int]) -> set[tuple[int, int]]:
    """(size as built, size wanted) of axes and lengths that differ."""
    found = {
        (old, new)
        for name, shape in _shapes(built).items()
        for old, new in zip(shape, wanted.get(name, shape))
        if old != new
    }
    return found | {(n, lengths[name]) for name, n in _lengths(built).items() if lengths.get(name, n) != n}


def _scaled(value: int, old: int, new: int) -> int | None:
    """What a number becomes if it is `old`, a whole part of it or a multiple of it, and `old` becomes `new`."""
    if value < 1 or (value % old and old % value) or value * new % old or value * new == 0:
        return None
    return value * new // old


def _numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """Paths and values of the whole numbers, or None, of a config and those in it; ("sizes", "2") is in a list."""
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if value is None or type(value) is int:
            yield (*path, name), value
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            yield from (((*path, name, str(i)), item) for i, item in enumerate(value))
        elif callable(getattr(value, "to_dict", None)):
            yield from _numbers(value, (*path, name))


def _alike(built: Shapes, wanted: Shapes) -> bool:
    """Whether tensors that differ in the numbers in their names alone, and had one shape, still have one."""
    seen: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for name in built.keys() & wanted.keys():
        key = re.sub(r"\d+", "", name), built[name]
        if seen.setdefault(key, wanted[name]) != wanted[name]:
            return False
    return True


def _changed(config: Any, changes: dict[tuple[str, ...], int]) -> Any:
    """A copy with these numbers; None where the config's class refuses one."""
    trial = copy.deepcopy(config)
    try:
        for path, value in changes.items():
            _set(trial, path, value)
    except Exception:  # what a config's class raises of a value that it does not take is its own
        return None
    return trial


def _set(config: Any, path: tuple[str, ...], value: int) -> None:
    *owners, last = path
    for name in owners[:-1]:
        config = getattr(config, name)
    if last.isdecimal():
        items = list(getattr(config, owners[-1]))
        items[int(last)] = value
        setattr(config, owners[-1], type(getattr(config, owners[-1]))(items))
        return
    setattr(getattr(config, owners[-1]) if owners else config, last, value)


def _changes(old: Any, new: Any) -> dict[str, int | tuple[int, ...]]:
    """The attributes that differ, by dotted path, lists whole."""
    before, after = dict(_numbers(old)), dict(_numbers(new))
    found: dict[str, int | tuple[int, ...]] = {}
    for path in [path for path, value in after.items() if before[path] != value]:
        parts = path[:-1] if path[-1].isdecimal() else path
        owner = new
        for part in parts:
            owner = getattr(owner, part)
        found[".".join(parts)] = tuple(owner) if isinstance(owner, (list, tuple)) else owner
    return found
