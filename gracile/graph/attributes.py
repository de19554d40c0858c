"""Integer attributes of a model, replaced by traced ones during the trace and put back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gracile.graph.integers import Attribute, Source, Traced

#: Attributes of `nn.Module` that are bookkeeping or could not size an axis.
IGNORED = frozenset({"training", "call_super_init", "dump_patches", "_version"})


@contextmanager
def traced_attributes(
    model: nn.Module, on_equal: Callable[[Source, Source], None]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Within the context, every integer that the model or an object it holds has as attribute knows its path.

    Gives the attributes that are tuples or lists, as they were.
    """
    sequences: dict[str, tuple[int, ...]] = {}
    planted: list[tuple[dict[str, Any], str, Any]] = []
    owners = list(_owners(model))
    try:
        for path, held in owners:
            for name, value in list(held.items()):
                full = f"{path}.{name}" if path else name
                replaced = _replacement(full, name, value, on_equal)
                if replaced is not None:
                    if not isinstance(value, int):
                        sequences[full] = tuple(value)
                    planted.append((held, name, value))
                    held[name] = replaced
        yield sequences
    finally:
        for held, name, value in planted:
            if _is_traced(held.get(name)):
                held[name] = value
        for _, held in owners:
            for name, value in list(held.items()):
                if _is_traced(value):
                    held[name] = _plain(value)


def _owners(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Attribute dictionaries of the modules, and of the plain objects (configurations) that they hold, once each."""
    seen: set[int] = set()
    objects: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        yield path, module.__dict__
        prefix = f"{path}." if path else ""
        objects += [(prefix + name, held) for name, held in module.__dict__.items() if _is_plain_object(held)]
    while objects:
        path, held = objects.pop(0)
        if id(held) in seen:
            continue
        seen.add(id(held))
        yield path, held.__dict__
        objects += [(f"{path}.{name}", inner) for name, inner in held.__dict__.items() if _is_plain_object(inner)]


def _is_plain_object(held: Any) -> bool:
    """A configuration or another record of settings: not a module, type, function, tensor or container."""
    if isinstance(held, (nn.Module, type)) or callable(held):
        return False
    module = type(held).__module__.partition(".")[0]
    return isinstance(getattr(held, "__dict__", None), dict) and module not in ("torch", "builtins", "numpy", "logging")


def _replacement(path: str, name: str, value: Any, on_equal: Callable[[Source, Source], None]) -> Any:
    if name in IGNORED or name.startswith("_") or isinstance(value, (bool, Traced)):
        return None
    if type(value) is int and value > 1:
        return Traced(value, Attribute(path, None, value), on_equal)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        items = [Traced(item, Attribute(path, i, item), on_equal) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return None


def _is_traced(value: Any) -> bool:
    return isinstance(value, Traced) or (type(value) in (tuple, list) and any(isinstance(v, Traced) for v in value))


def _plain(value: Any) -> Any:
    if isinstance(value, Traced):
        return int(value)
    return type(value)(int(item) if isinstance(item, Traced) else item for item in value)
