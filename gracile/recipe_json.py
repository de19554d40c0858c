"""Recipes as JSON: what `to_config` writes of any step, read back; and number formats by their short names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from gracile import allocate, criteria, equalize, formats, goal, losses, patterns, ranges, solvers, targets
from gracile.config import from_config
from gracile.errors import ConfigError
from gracile.formats import FixedPoint, Format, Int, Scheme
from gracile.recipe import Recipe, Step, only
from gracile.steps import SGD, AdamW, Distill, Factorize, Finetune, Gradual, Iterative, Prune, Quantize

SCHEME_NAMES = "w8a8, w7a8, w8a16, w4a8, w4a4, w3a8, w3a3, w2a8, w2a2, w4a16[:group], w3a16[:group], w2a16[:group], "
SCHEME_NAMES += "w8a8-dynamic, w7a8-dynamic, int2 ... int8 or fixed:factor"


def recipe_from_json(config: Any) -> Step:
    """The step that `to_config` wrote as plain data; equal to the original in every field.

    A list is a recipe of its steps, and the scheme of a Quantize may be a short name ("w8a8"; see `scheme_named`).
    Raises ConfigError for an unknown type or field, an impossible setting, or what is no step.
    """
    if isinstance(config, list):
        config = {"type": "Recipe", "steps": config}
    step = from_config(config, classes())
    if not isinstance(step, Step):
        raise ConfigError(
            f"A recipe in JSON is an object with a 'type' (Prune, Factorize, Quantize, Distill, Finetune, Iterative, "
            f"Gradual, Recipe, Only) or a list of them, not {_shown(config)}.\n"
            f'  For example: [{{"type": "Prune", "fraction": 0.3}}, {{"type": "Quantize", "scheme": "w8a8"}}]'
        )
    return step


def classes() -> dict[str, Callable[..., Any]]:
    """What a recipe may name: steps, and the public settings of every family that they are made of."""
    families = (criteria, equalize, losses, ranges, formats, solvers, targets)
    members = [getattr(family, name) for family in families for name in family.__all__]
    members += [patterns.Unstructured, patterns.NM, patterns.Channels, patterns.Heads, patterns.Layers]
    members += [allocate.Uniform, allocate.GlobalRank, allocate.MeasuredLoss]
    members += [goal.MACs, goal.Parameters, goal.Bytes, goal.Latency]
    members += [Distill, Factorize, Finetune, Gradual, Iterative, Prune, SGD, AdamW]
    found = {m.__name__: m for m in members if isinstance(m, type) and is_dataclass(m)}
    return found | {"Recipe": _recipe, "Only": _only, "Quantize": _quantize}


def scheme_named(name: str) -> Scheme | Format:
    """The scheme or format with a short name: w8a8, w4a8, w4a16 (groups of 128), w4a16:32, int2 ... int8, fixed:256.

    int<b> are weights of b bits with one scale per output channel; fixed:<f> is round(x · f) / f. Raises ConfigError.
    """
    key, _, amount = name.strip().lower().partition(":")
    attribute = key.upper().replace("-DYNAMIC", "Dynamic")
    preset = getattr(formats, attribute, None) if re.fullmatch(r"w\da\d+(-dynamic)?", key) else None
    if isinstance(preset, Scheme) and not amount:
        return preset
    if callable(preset) and re.fullmatch(r"|[1-9]\d*", amount):
        scheme: Scheme = preset(int(amount)) if amount else preset()
        return scheme
    if re.fullmatch(r"int[2-8]", key) and not amount:
        return Int(int(key[3:]))
    if key == "fixed" and re.fullmatch(r"\d+(\.\d+)?", amount):
        factor = float(amount)
        return FixedPoint(int(factor) if factor.is_integer() else factor)
    raise ConfigError(f"'{name}' is not a number format.\n  Use {SCHEME_NAMES}.")


def _recipe(steps: Any) -> Recipe:
    return Recipe(*steps)


def _only(patterns: Any, step: Any) -> Step:
    return only(patterns, step)


def _quantize(scheme: Any = None, options: Any = (), **settings: Any) -> Quantize:
    return Quantize(_named(scheme), options=tuple(_named(each) for each in options), **settings)


def _named(scheme: Any) -> Any:
    return scheme_named(scheme) if isinstance(scheme, str) else scheme


def _shown(config: Any) -> str:
    text = repr(config)
    return text if len(text) <= 60 else f"{text[:57]}..."
