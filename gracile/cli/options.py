"""Options that several commands share, and how their texts become settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from gracile.errors import ConfigError, TargetError
from gracile.goal import Budget, Bytes, Latency, MACs, Parameters

Function = TypeVar("Function", bound=Callable[..., Any])

TARGETS = ("onnxruntime", "openvino", "pytorch")
LIMITS = ("latency", "latency-ms", "macs", "bytes", "parameters")
CRITERIA = ("magnitude", "gradient", "taylor", "hessian")

model_argument = click.argument("model")


def data_option(required: bool, help: str = "Factory that returns gracile.Data.") -> Callable[[Function], Function]:
    """--data."""
    return click.option("--data", "data_name", metavar="DATA", required=required, help=help)


def class_option(function: Function) -> Function:
    """--class."""
    text = "Factory of a fresh model to load a saved directory into, if its class cannot be built by itself."
    return click.option("--class", "class_name", metavar="FACTORY", help=text)(function)


def target_options(required: bool) -> Callable[[Function], Function]:
    """--target, --precision and --threads."""

    def decorate(function: Function) -> Function:
        function = click.option(
            "--threads", type=click.IntRange(min=1), help="Threads of the runtime. [default: all cores]"
        )(function)
        function = click.option("--precision", help="The runtime's own mode for float layers: f32, default, bf16.")(
            function
        )
        return click.option(
            "--target",
            "target_name",
            type=click.Choice(TARGETS),
            required=required,
            help="Runtime that serves the model.",
        )(function)

    return decorate


def saving_options(function: Function) -> Function:
    """--seed, --out and --run-dir."""
    function = click.option(
        "--run-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where finished steps are kept; the same command goes on from there. [default: OUT.run]",
    )(function)
    function = click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("slim"),
        show_default=True,
        help="Directory for the compressed model and its report.",
    )(function)
    return click.option("--seed", type=int, default=0, show_default=True, help="Of all randomness.")(function)


def run_directory_of(out: Path, run_dir: Path | None) -> Path:
    """The run directory: as given, or beside the output."""
    return run_dir if run_dir is not None else out.with_name(f"{out.name}.run")


def make_target(name: str, precision: str | None = None, threads: int | None = None) -> Any:
    """The target with a name, "openvino" or "openvino:default"; raises ConfigError for what it has not."""
    from gracile.targets import OnnxRuntime, OpenVINO, PyTorch

    known: dict[str, type] = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO, "pytorch": PyTorch}
    base, _, mode = name.partition(":")
    if base not in known:
        raise ConfigError(f"There is no target '{base}'.\n  Use {', '.join(TARGETS)}.")
    settings: dict[str, Any] = {"threads": threads} if threads is not None else {}
    wanted = mode or precision
    if wanted:
        if "precision" in {f.name for f in fields(known[base])}:
            settings["precision"] = wanted
        elif wanted not in known[base].capabilities.precisions:  # type: ignore[attr-defined]
            raise ConfigError(f"{base} has one precision, f32, and not '{wanted}'.")
    return known[base](**settings)


def usable_target(name: str, precision: str | None = None, threads: int | None = None) -> Any:
    """`make_target`, and TargetError where it is not installed."""
    target = make_target(name, precision, threads)
    missing = target.available()
    if missing is not None:
        raise TargetError(f"The target {target.name} cannot be used here: {missing}")
    return target


def parse_limit(text: str) -> Budget:
    """A limit: "latency=0.4" (of the original), "latency-ms=2.0", "macs=0.5", "bytes=20000", "parameters=1e6"."""
    kind, _, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    kinds: dict[str, Callable[[float], Budget]] = {
        "latency": Latency,
        "latency-ms": lambda ms: Latency(ms, ms=True),
        "macs": MACs,
        "bytes": Bytes,
        "parameters": Parameters,
    }
    if kind not in kinds or not 0 < amount < float("inf"):
        raise ConfigError(
            f"'{text}' is not a limit.\n  Write KIND=NUMBER with a positive number and a kind of {', '.join(LIMITS)}; "
            f"for example latency=0.4."
        )
    if kind == "latency" and amount > 1:
        raise ConfigError(
            f"'{text}': a latency is a fraction of the original's; for milliseconds write latency-ms={number}."
        )
    return kinds[kind](amount)


def make_pattern(name: str) -> Any:
    """The pattern with a name: weights, channels, heads, layers, or keep:of such as 2:4."""
    from gracile.patterns import NM, Channels, Heads, Layers, Unstructured

    known: dict[str, Callable[[], Any]] = {
        "weights": Unstructured,
        "channels": Channels,
        "heads": Heads,
        "layers": Layers,
    }
    if name in known:
        return known[name]()
    match = re.fullmatch(r"(\d+):(\d+)", name)
    if match is None:
        raise ConfigError(f"'{name}' is not a pattern.\n  Use {', '.join(known)}, or keep:of such as 2:4.")
    return NM(int(match[1]), int(match[2]))


def make_criterion(name: str) -> Any:
    """The criterion with a name of `CRITERIA`."""
    from gracile.criteria import Gradient, Hessian, Magnitude, Taylor

    known: dict[str, Callable[[], Any]] = {
        "magnitude": Magnitude,
        "gradient": Gradient,
        "taylor": Taylor,
        "hessian": Hessian,
    }
    return known[name]()
