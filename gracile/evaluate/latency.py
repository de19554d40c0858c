"""Latency of several runners against each other, interleaved in one process so that all share the machine's moods."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gracile.environment import instruction_set
from gracile.errors import ConfigError

#: Resamples of the bootstrap interval of a ratio.
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one call takes.

    p50_ms, p95_ms: median and 95th percentile of `samples` calls, in milliseconds.
    ratio: the first runner's median divided by this one's: 2.0 is twice as fast. ratio_low, ratio_high: 95 % bootstrap
        interval over rounds, in which both were measured. 1 for the first runner itself.
    times_ms: the single timings in milliseconds, in the order of the rounds; left out of `to_json`.
    precision, threads, batch_size: as the caller states them; None where not stated.
    instruction_set: of the processor, see `instruction_set`.
    """

    p50_ms: float
    p95_ms: float
    samples: int
    ratio: float
    ratio_low: float
    ratio_high: float
    times_ms: tuple[float, ...] = ()
    precision: str | None = None
    threads: int | None = None
    batch_size: int | None = None
    instruction_set: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the single timings."""
        return {name: value for name, value in asdict(self).items() if name != "times_ms"}


def measure_latency(
    runners: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 200,
    warmup: int = 3,
    seconds: float = 5.0,
    seed: int = 0,
    precision: Mapping[str, str] | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Latency]:
    """Median and tail of each runner's call, round-robin in a new random order every round.

    runners: name -> a call without arguments; the first is what the others are compared with.
    rounds: at most so many. seconds: of measuring altogether, after which no round begins (but 5 are always made).
    warmup: calls of each before measuring. precision: of each runner by name; recorded, as are threads and batch_size.
    In its turn a runner is called twice and the second call is timed: the first pays for the caches and the spinning
    threads that the runner before it left behind.
    """
    if not runners:
        raise ConfigError("measure_latency: no runners given.")
    if rounds < 1 or warmup < 0 or seconds <= 0:
        raise ConfigError(
            f"measure_latency(rounds={rounds}, warmup={warmup}, seconds={seconds}): rounds and seconds are positive."
        )
    order = list(runners)
    for name in order:
        for _ in range(warmup):
            runners[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffler = random.Random(seed)
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= min(5, rounds) and time.perf_counter() > deadline:
            break
        for name in shuffler.sample(order, len(order)):
            call = runners[name]
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    first = np.array(times[order[0]])
    instructions = instruction_set()
    return {
        name: _summary(
            first,
            np.array(times[name]),
            seed,
            precision=(precision or {}).get(name),
            threads=threads,
            batch_size=batch_size,
            instruction_set=instructions,
        )
        for name in order
    }


@dataclass(frozen=True)
class Relative:
    """One call's time as a share of another's.

    share: median over rounds of its time divided by the other's in the same round. error: standard error of that.
    reference_ms: the other's median. rounds: how many.
    """

    share: float
    error: float
    reference_ms: float
    rounds: int


def measure_relative(
    reference: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    seconds: float = 0.4,
    longest: float = 4.0,
    within: float = 0.004,
    seed: int = 0,
) -> Relative:
    """How long `candidate` takes as a share of `reference`, both timed in turn round by round.

    seconds: measured at least, and then until the standard error is below `within`, or for `longest` seconds; five
        rounds are always made.
    """
    ours: list[float] = []
    theirs: list[float] = []
    start = time.perf_counter()
    while True:
        found = measure_latency(
            {"reference": reference, "candidate": candidate},
            seconds=seconds,
            warmup=0 if ours else 1,
            seed=seed + len(ours),
        )
        theirs += found["reference"].times_ms
        ours += found["candidate"].times_ms
        shares = np.array(ours) / np.array(theirs)
        # Of a median: from the quartiles, since a round that something disturbed must not count.
        low, high = np.percentile(shares, (25, 75))
        error = float(1.253 * (high - low) / 1.349 / np.sqrt(len(shares)))
        if error <= within or time.perf_counter() - start >= longest:
            return Relative(float(np.median(shares)), error, float(np.median(theirs)), len(shares))


def _summary(first: NDArray[Any], times: NDArray[Any], seed: int, **stated: Any) -> Latency:
    """Percentiles of `times`, and their ratio to `first`, resampled by rounds."""
    picks = np.random.default_rng(seed).integers(0, len(times), (RESAMPLES, len(times)))
    ratios = np.median(first[picks], axis=1) / np.median(times[picks], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    p50, p95 = np.percentile(times, (50, 95))
    return Latency(
        p50_ms=float(p50),
        p95_ms=float(p95),
        samples=len(times),
        ratio=float(np.median(first) / p50),
        ratio_low=float(low),
        ratio_high=float(high),
        times_ms=tuple(float(t) for t in times),
        **stated,
    )
