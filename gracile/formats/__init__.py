"""Number formats: how a weight is written, packed and read back."""

from __future__ import annotations

import math
from typing import Any

import torch

from gracile.errors import ArtifactError, ConfigError
from gracile.formats.base import Format, Granularity, PerChannel, PerGroup, PerTensor, PerToken, format_to_config
from gracile.formats.codebook import Codebook
from gracile.formats.fixed_point import FixedPoint
from gracile.formats.integer import Int, is_dynamic
from gracile.formats.levels import FP4, NF4, Binary, Levels, MidRise, PowersOfTwo, Ternary
from gracile.formats.micro_float import FP8, MXFP4, NVFP4
from gracile.formats.presets import (
    W2A2,
    W2A8,
    W2A16,
    W3A3,
    W3A8,
    W3A16,
    W4A4,
    W4A8,
    W4A16,
    W7A8,
    W8A8,
    W8A16,
    Scheme,
    W7A8Dynamic,
    W8A8Dynamic,
)
from gracile.formats.titles import format_title

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "NVFP4",
    "W2A2",
    "W2A8",
    "W2A16",
    "W3A3",
    "W3A8",
    "W3A16",
    "W4A4",
    "W4A8",
    "W4A16",
    "W7A8",
    "W8A8",
    "W8A16",
    "Binary",
    "Codebook",
    "FixedPoint",
    "Format",
    "Granularity",
    "Int",
    "Levels",
    "MidRise",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "PowersOfTwo",
    "Scheme",
    "Ternary",
    "W7A8Dynamic",
    "W8A8Dynamic",
    "bits_per_weight",
    "format_from_config",
    "format_title",
    "format_to_config",
    "is_dynamic",
]


def format_from_config(config: dict[str, Any] | None) -> Any:
    """The format or granularity that `format_to_config` wrote as plain data; None for None.

    Only the classes exported here are built; anything else raises ArtifactError.
    """
    if config is None:
        return None
    name = config.get("type") if isinstance(config, dict) else None
    kind = globals().get(name) if isinstance(name, str) and name in __all__ else None
    if not (isinstance(kind, type) and issubclass(kind, (Format, Granularity))):
        raise ArtifactError(f"'{name}' is not a number format of this version of Gracile.\n  A newer one may have it.")
    fields = {
        key: format_from_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "type"
    }
    try:
        return kind(**fields)
    except (TypeError, ConfigError) as error:
        raise ArtifactError(f"The settings of the format {name} cannot be read: {error}") from error


def bits_per_weight(fmt: Format, shape: torch.Size | tuple[int, ...]) -> float:
    """Bits stored per weight of this shape, scales and zero points included."""
    return 8 * fmt.size_bytes(shape) / math.prod(shape)
