"""Plain JSON data: what a report holds, written so that it comes back exactly, infinities and NaN included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: JSON has no NaN or infinity; such a float is written as {NOT_FINITE: "nan"}, "inf" or "-inf".
NOT_FINITE = "not_finite"


def plain(value: Any) -> Any:
    """The value as dicts, lists, strings, numbers and None: dataclasses by field, arrays as lists, keys as strings.

    Floats that JSON cannot write are kept; see `encode`.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in sorted(value, key=str)]
    if hasattr(value, "tolist"):  # a tensor, a NumPy array or scalar
        return plain(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    return str(value)


def encode(value: Any) -> Any:
    """`plain(value)` with every float that is not finite as `{NOT_FINITE: name}`: strict JSON can hold it."""
    return _encoded(plain(value))


def decode(value: Any) -> Any:
    """The plain data that `encode` wrote."""
    if isinstance(value, dict):
        if set(value) == {NOT_FINITE}:
            return float(value[NOT_FINITE])
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {NOT_FINITE: str(value)}
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return value
