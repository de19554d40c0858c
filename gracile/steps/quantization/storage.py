"""Schemes that a runtime only stores: known before the work starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gracile.formats import Int, MidRise, PerGroup, Scheme, format_title, is_dynamic


def stored_only(schemes: Sequence[Scheme], target: Any) -> str | None:
    """What a target does not compute in few bits of these schemes, as a sentence for the user; None: it does all.

    target: None: no runtime was named.
    """
    if target is None:
        return None
    reasons = {scheme.name: reason for scheme in schemes if (reason := _reason(scheme, target)) is not None}
    if not reasons:
        return None
    parts = [f"{name}, since {reason}" for name, reason in reasons.items()]
    return (
        f"{target.name} does not run {'; nor '.join(parts)}. The saved model is smaller; the exported one is no faster."
    )


def _reason(scheme: Scheme, target: Any) -> str | None:
    known: tuple[str, ...] = target.capabilities.schemes
    if scheme.name in known:
        return None
    if not known:
        return "it decodes weights at every call"
    if not isinstance(scheme.weight, (Int, MidRise)):
        return f"it has no kernels for {format_title(scheme.weight)}, which is written as floating point"
    if is_dynamic(scheme.input) and not any(name.endswith("-dynamic") for name in known):
        return "it computes with inputs that have a scale for each token in floating point"
    if scheme.input is not None and isinstance(scheme.weight.granularity, PerGroup):
        return "no kernel adds up groups of a row in integers"
    return None
