"""Which settings of Quantize go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gracile.equalize import AWQ, CrossLayer, InputScales, SmoothQuant
from gracile.errors import ConfigError
from gracile.formats import Format, Scheme
from gracile.goal import Bytes, Latency
from gracile.ranges import Range
from gracile.select import check_exclude
from gracile.solvers import RoundingSolver

if TYPE_CHECKING:
    from gracile.steps.quantize import Quantize


def check_settings(step: Quantize) -> None:
    """Raise ConfigError for settings that are not what they should be, or do not go together."""
    if step.to is None:
        _check_scheme(step)
    else:
        _check_options(step)
    if not isinstance(step.ranges, Range):
        raise ConfigError(f"Quantize(ranges={step.ranges!r}): expected MinMax(), MSE() or another of ranges.")
    if step.equalize is not None:
        _check_equalize(step)
    if step.solver is not None and not isinstance(step.solver, RoundingSolver):
        raise ConfigError(f"Quantize(solver={step.solver!r}): expected a rounding solver, solvers.GPTQ(), or None.")
    check_exclude("Quantize", step.exclude)


def _check_scheme(step: Quantize) -> None:
    if step.options:
        raise ConfigError("Quantize(options=...): goes with a budget, to=Bytes(0.15) or to=Latency(0.6).")
    if not isinstance(step.scheme, (Scheme, Format)):
        hint = " W4A16 takes its group: W4A16(group=128)." if callable(step.scheme) else ""
        raise ConfigError(
            f"Quantize({step.scheme!r}): not a scheme or a format.{hint}\n"
            f"  Use W8A8, W8A16, W4A16(group=32) or Int(bits=4)."
        )


def _check_options(step: Quantize) -> None:
    if not isinstance(step.to, (Bytes, Latency)):
        raise ConfigError(
            f"Quantize(to={step.to!r}): the budget of formats is one of bytes or latency, Bytes(0.15) or Latency(0.6)."
        )
    if step.scheme is not None or not isinstance(step.options, tuple) or len(step.options) < 2:
        raise ConfigError(
            "Quantize(to=...): takes options=(W8A8, W4A8, ...), two schemes at least, and no scheme besides."
        )
    for option in step.options:
        if option is not None and not isinstance(option, (Scheme, Format)):
            raise ConfigError(f"Quantize(options=...): {option!r} is not a scheme or a format.")
    if step.options.count(None) > 1:
        raise ConfigError("Quantize(options=...): None, to stay in floating point, is an option once.")


def _check_equalize(step: Quantize) -> None:
    name, rounds_inputs = type(step.equalize).__name__, any(scheme.input is not None for scheme in step.schemes)
    if not isinstance(step.equalize, (InputScales, CrossLayer)):
        raise ConfigError(
            f"Quantize(equalize={step.equalize!r}): expected equalize.SmoothQuant(), AWQ(), CrossLayer() or None."
        )
    if step.to is not None:
        raise ConfigError(f"Quantize(to=..., equalize={name}()): is judged by one scheme; leave out one.")
    if isinstance(step.equalize, SmoothQuant) and not rounds_inputs:
        raise ConfigError(
            f"{step.title}, equalize=SmoothQuant(): needs a scheme with an input format; where inputs stay as they "
            f"are, there is nothing to smooth.\n  Use equalize.AWQ(), or W8A8."
        )
    if isinstance(step.equalize, AWQ) and rounds_inputs:
        raise ConfigError(
            f"{step.title}, equalize=AWQ(): is for schemes that leave inputs in floating point.\n"
            f"  Use equalize.SmoothQuant(), or W4A16(group=128)."
        )
