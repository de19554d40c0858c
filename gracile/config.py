"""Settings as plain data: any frozen dataclass of ours to JSON and back, by class name and fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from gracile.errors import ConfigError


def to_config(value: Any) -> Any:
    """Plain JSON data of a setting: a dataclass as {"type": class name, field: value, ...}, a callable as its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{f.name: to_config(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(k): to_config(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_config(item) for item in value]
    if callable(value):
        return {"callable": f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', repr(value))}"}
    return {"type": type(value).__name__}


def from_config(config: Any, classes: Mapping[str, Callable[..., Any]]) -> Any:
    """The setting that `to_config` wrote; `classes` are the dataclasses (or makers) it may name. Lists become tuples.

    Raises ConfigError for a class not among `classes`, an unknown field, or a callable (which JSON cannot carry).
    """
    if isinstance(config, list):
        return tuple(from_config(item, classes) for item in config)
    if not isinstance(config, dict):
        return config
    if "callable" in config:
        raise ConfigError(f"A recipe in JSON cannot carry the function {config['callable']}; set it in Python.")
    name = config.get("type")
    if name is None:
        return {key: from_config(value, classes) for key, value in config.items()}
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(f"Unknown type {name!r}.\n  Known: {', '.join(sorted(classes))}.")
    values = {key: from_config(value, classes) for key, value in config.items() if key != "type"}
    try:
        return classes[name](**values)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error
