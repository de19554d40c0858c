"""Goal: the limits a compressed model must keep and what to make as small as possible within them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from gracile.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """At most this much: a fraction of the original in (0, 1), or an absolute number in the class's unit above 1.

    way: part of the way there, in (0, 1], by ratio: half of the way to a quarter of the original is half of it. 1: all.
    """

    amount: float
    _: KW_ONLY
    way: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.amount, (int, float)) or isinstance(self.amount, bool) or not self.amount > 0:
            raise ConfigError(
                f"{type(self).__name__}({self.amount!r}): expected a positive number, a fraction of the original "
                f"below 1 or an absolute amount above 1."
            )
        if not (isinstance(self.way, (int, float)) and 0 < self.way <= 1):
            raise ConfigError(f"{type(self).__name__}(way={self.way!r}): expected a number above 0 and up to 1.")

    @property
    def is_fraction(self) -> bool:
        """Whether the amount is a fraction of the original, not a number in the class's unit."""
        return self.amount <= 1

    def limit(self, original: float) -> float:
        """The largest allowed amount, in the unit of `original`."""
        whole = self.amount * original if self.is_fraction else float(self.amount)
        return whole if self.way == 1 else original * (whole / original) ** self.way

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.amount:g}){self._way}"

    @property
    def _way(self) -> str:
        return "" if self.way == 1 else f", {self.way:.0%} of the way"


@dataclass(frozen=True)
class MACs(Budget):
    """Multiply-accumulates of one example."""


@dataclass(frozen=True)
class Parameters(Budget):
    """Number of parameters."""


@dataclass(frozen=True)
class Bytes(Budget):
    """Bytes of the model as stored."""


@dataclass(frozen=True)
class Latency(Budget):
    """Median latency of one batch on a target, as a fraction of the original's there; with `ms`, in milliseconds.

    amount: a fraction of the original in (0, 1], or milliseconds if `ms` is set.
    target: the runtime; None: the goal's target.
    """

    target: Any = None
    ms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            check_target(self.target, "Latency(target=...)")

    @property
    def is_fraction(self) -> bool:
        return not self.ms

    def __str__(self) -> str:
        unit = " ms" if self.ms else ""
        where = f" on {self.target.name}" if self.target is not None else ""
        return f"Latency({self.amount:g}{unit}){where}{self._way}"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What `optimize` should reach.

    target: the runtime that will serve the model.
    max_drop: largest loss of quality allowed, in the unit of the metric (0.01 of an accuracy is one point). The drop's
        one-sided upper confidence bound must stay below it.
    objective: what to make as small as possible within the limits: "latency", "bytes" or "macs".
    limits: further budgets that must hold; a `Latency(0.4)` asks for a model 2.5 times as fast.
    confidence: of the bound on the drop.
    batch_size: of the latency measured; None: that of the evaluation batches.
    epochs: of distillation for one candidate, where training data are given.
    minutes: no new candidate is started after that; None: no limit.
    """

    target: Any
    max_drop: float = 0.01
    objective: Literal["latency", "bytes", "macs"] = "latency"
    limits: tuple[Budget, ...] = ()
    confidence: float = 0.95
    batch_size: int | None = None
    epochs: int = 4
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.max_drop, (int, float)) and 0 <= self.max_drop < float("inf")):
            raise ConfigError(f"Goal(max_drop={self.max_drop!r}): expected a number of at least 0.")
        if self.objective not in ("latency", "bytes", "macs"):
            raise ConfigError(f"Goal(objective={self.objective!r}): expected 'latency', 'bytes' or 'macs'.")
        if not (isinstance(self.confidence, float) and 0.5 <= self.confidence < 1):
            raise ConfigError(f"Goal(confidence={self.confidence!r}): expected a number in [0.5, 1).")
        if self.batch_size is not None and not (_is_whole(self.batch_size) and self.batch_size >= 1):
            raise ConfigError(f"Goal(batch_size={self.batch_size!r}): expected a whole number of at least 1.")
        if not (_is_whole(self.epochs) and self.epochs >= 0):
            raise ConfigError(f"Goal(epochs={self.epochs!r}): expected a whole number of at least 0.")
        if self.minutes is not None and not (isinstance(self.minutes, (int, float)) and self.minutes > 0):
            raise ConfigError(f"Goal(minutes={self.minutes!r}): expected a positive number.")
        check_target(self.target, "Goal(target=...)")
        if not isinstance(self.limits, (tuple, list)):
            raise ConfigError(f"Goal(limits={self.limits!r}): expected a tuple of budgets, for example (MACs(0.5),).")
        for budget in self.limits:
            if not isinstance(budget, Budget):
                raise ConfigError(f"Goal(limits=...): {budget!r} is not a budget (MACs, Parameters, Bytes, Latency).")


def check_target(target: Any, where: str) -> None:
    """Raise ConfigError, naming where it was given, unless `target` is a runtime; its class or its name is none."""
    methods = ("export", "load", "run", "available")
    if isinstance(target, type) or not all(callable(getattr(target, name, None)) for name in methods):
        raise ConfigError(
            f"{where}: {target!r} is not a target.\n"
            f"  Use gracile.OnnxRuntime(), gracile.OpenVINO() or gracile.PyTorch()."
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
