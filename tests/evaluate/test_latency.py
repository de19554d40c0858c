"""Interleaved latency: who is called when, and what the numbers say about calls of known length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from gracile.environment import instruction_set
from gracile.errors import ConfigError
from gracile.evaluate import latency as module
from gracile.evaluate.latency import measure_latency, measure_relative


def sleeper(milliseconds: float) -> Callable[[], None]:
    return lambda: time.sleep(milliseconds / 1e3)


@pytest.mark.timed
def test_a_call_of_half_the_time_is_twice_as_fast() -> None:
    found = measure_latency({"slow": sleeper(8), "fast": sleeper(4)}, rounds=15)
    # sleeping lasts at least as asked, and on a busy machine somewhat longer
    assert 8 <= found["slow"].p50_ms < 16
    assert 4 <= found["fast"].p50_ms < 8
    assert found["slow"].ratio == 1
    assert 1.3 < found["fast"].ratio < 3
    assert found["fast"].ratio_low <= found["fast"].ratio <= found["fast"].ratio_high
    assert found["fast"].ratio_low > 1
    assert all(latency.p95_ms >= latency.p50_ms for latency in found.values())
    assert all(latency.samples == 15 for latency in found.values())


def test_runners_take_turns_in_an_order_that_changes() -> None:
    calls: list[str] = []
    runners = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    measure_latency(runners, rounds=30, warmup=2)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [calls[i : i + 6] for i in range(6, len(calls), 6)]
    assert len(rounds) == 30
    assert all(sorted(turn) == ["a", "a", "b", "b", "c", "c"] for turn in rounds)
    assert all(turn[0] == turn[1] for turn in rounds)  # one call to settle, one that is timed
    assert len({tuple(turn) for turn in rounds}) == 6  # every order came up


def test_time_ends_the_measurement_but_never_before_five_rounds() -> None:
    found = measure_latency({"a": sleeper(5)}, rounds=1000, warmup=0, seconds=0.01)
    assert found["a"].samples == 5
    start = time.perf_counter()
    assert measure_latency({"a": sleeper(1)}, rounds=100_000, seconds=0.2)["a"].samples > 5
    assert time.perf_counter() - start < 5


def test_what_the_number_stands_for_is_recorded() -> None:
    found = measure_latency(
        {"a": sleeper(0), "b": sleeper(0)}, rounds=5, precision={"b": "bf16"}, threads=2, batch_size=32
    )
    record = found["b"].to_json()
    assert record["precision"] == "bf16"
    assert found["a"].precision is None
    assert (record["threads"], record["batch_size"]) == (2, 32)
    assert record["instruction_set"] == instruction_set()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="no runners"):
        measure_latency({})
    with pytest.raises(ConfigError, match="positive"):
        measure_latency({"a": sleeper(0)}, rounds=0)
    with pytest.raises(ConfigError, match="positive"):
        measure_latency({"a": sleeper(0)}, seconds=0)


def scripted(monkeypatch: pytest.MonkeyPatch, noise: list[float]) -> list[float]:
    """Let measure_latency give five rounds a call: the machine is slower in each round, the candidate takes half.

    noise: of the candidate's share, by call; the seconds that each call was given are returned.
    """
    calls: list[float] = []

    def measure(runners: Any, *, seconds: float, warmup: int, seed: int) -> Any:
        spread = noise[min(len(calls), len(noise) - 1)]
        slow = [10.0 * (1 + i + 5 * len(calls)) for i in range(5)]
        calls.append(seconds)
        fast = [t * (0.5 + spread * (i - 2)) for i, t in enumerate(slow)]
        times = {"reference": slow, "candidate": fast}
        assert list(runners) == list(times) and warmup == (1 if len(calls) == 1 else 0)
        return {name: type("Found", (), {"times_ms": tuple(times[name])}) for name in times}

    monkeypatch.setattr(module, "measure_latency", measure)
    return calls


def test_a_relative_time_is_the_median_over_rounds_whatever_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, [0.0])
    found = measure_relative(lambda: None, lambda: None, seconds=0.3)
    assert (found.share, found.error, found.rounds, found.reference_ms) == (0.5, 0.0, 5, 30.0)
    assert calls == [0.3]


def test_a_relative_time_is_measured_until_it_is_certain_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, [0.01, 0.0])
    found = measure_relative(lambda: None, lambda: None, within=0.004)
    # By hand: quartiles of ±0.01 around the median, so 1.253 · 0.02 / 1.349 / sqrt(5) = 0.0083, then no spread at all.
    assert len(calls) == 2 and found.rounds == 10 and found.share == 0.5 and found.error <= 0.004


def test_a_relative_time_that_stays_uncertain_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, [0.05])
    found = measure_relative(lambda: None, lambda: None, longest=0.0)
    assert len(calls) == 1 and found.error == pytest.approx(1.253 * 0.1 / 1.349 / 5**0.5)
