"""Interleaved latency: who is called when, and what the numbers say about calls of known length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gracile.environment import instruction_set
from gracile.errors import ConfigError
from gracile.evaluate.latency import measure_latency


def sleeper(milliseconds: float) -> Callable[[], None]:
    return lambda: time.sleep(milliseconds / 1e3)


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
