"""Numbers as a person reads them: few digits, a unit, a comparison in words."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

ABSENT = "–"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def digits(value: float, significant: int = 3) -> str:
    """The number with so many significant digits, in plain notation where that is short: 0.0123, 1230, 1.2e-07."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 9:
        return f"{value:.{significant - 1}e}"
    text = f"{value:.{max(significant - 1 - exponent, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def show_bytes(value: float) -> str:
    """Bytes in decimal units: 512 B, 1.25 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def show_count(value: float) -> str:
    """A count: 980, 272 k, 40.8 M, 1.21 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{_three(value / (1e3 if unit == 'k' else size))} {unit}"
    return f"{value:,.0f}".replace(",", "\u202f")


def show_ms(value: float) -> str:
    """Milliseconds with three digits, or seconds from ten on."""
    return f"{_three(value / 1e3)} s" if value >= 1e4 else f"{_three(value)} ms"


def show_seconds(value: float) -> str:
    """A duration: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_quality(value: float, in_percent: bool) -> str:
    """A metric's value: as a percentage with two decimals, or as a number."""
    return f"{100 * value:.2f} %" if in_percent else digits(value, 4)


def show_difference(value: float, in_percent: bool) -> str:
    """after - before of a metric, signed, in points or as a number."""
    number = f"{100 * value:.2f}" if in_percent else digits(value)
    if number.strip("-0.") == "":
        return "unchanged"
    return f"{'+' if value > 0 else '−'}{number.lstrip('-')}{' pt' if in_percent else ''}"


def show_ratio(before: float, after: float, better: str, worse: str) -> str:
    """before / after in words: "2.50× smaller", "1.20× larger", "unchanged"."""
    if before <= 0 or after <= 0:
        return ABSENT
    ratio = before / after
    if abs(ratio - 1) < 0.005:
        return "unchanged"
    return f"{_times(ratio)} {better}" if ratio > 1 else f"{_times(1 / ratio)} {worse}"


def show_any(value: Any) -> str:
    """Any plain value in a few words."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return digits(value, 5 if 0.99 < value < 1 else 3)  # an agreement of 0.9998 is not 1
    if isinstance(value, (list, tuple)):
        return ", ".join(show_any(item) for item in value) or ABSENT
    if isinstance(value, dict):
        return ", ".join(f"{key} {show_any(item)}" for key, item in value.items()) or ABSENT
    return str(value)


def show_name(key: str) -> str:
    """A field's name as a label: "max_error" is "Max error"."""
    text = key.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def _three(value: float) -> str:
    if value < 0.9995:
        return digits(value)
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _times(ratio: float) -> str:
    return f"{_three(ratio)}×"
