from __future__ import annotations

from typing import Any

import pytest

from gracile.errors import ConfigError
from gracile.goal import Bytes, Goal, Latency, MACs, Parameters
from gracile.targets import PyTorch


@pytest.mark.parametrize("kind", [MACs, Parameters, Bytes])
def test_fractions_are_of_the_original_and_amounts_absolute(kind: Any) -> None:
    assert kind(0.25).limit(1000) == 250
    assert kind(1.0).limit(1000) == 1000
    assert kind(2.0).limit(1000) == 2
    assert kind(300).limit(1000) == 300


def test_latency_is_a_fraction_unless_it_is_in_milliseconds() -> None:
    assert Latency(0.4).limit(10) == 4
    assert Latency(0.4, ms=True).limit(10) == 0.4
    assert Latency(2.5, ms=True).limit(10) == 2.5


@pytest.mark.parametrize("amount", [0, -1, float("nan"), "half", None, True])
@pytest.mark.parametrize("kind", [MACs, Parameters, Bytes, Latency])
def test_impossible_budgets_are_refused(kind: Any, amount: Any) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__}\\("):
        kind(amount)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_drop": float("nan")}, "max_drop"),
        ({"max_drop": float("inf")}, "max_drop"),
        ({"max_drop": "1%"}, "max_drop"),
        ({"objective": "speed"}, "'latency', 'bytes' or 'macs'"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 0.2}, "confidence"),
        ({"confidence": 95}, "confidence"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": -1}, "epochs"),
        ({"minutes": 0}, "minutes"),
        ({"limits": (0.5,)}, "not a budget"),
        ({"target": "onnxruntime"}, "not a target"),
        ({"target": PyTorch}, "not a target"),
        ({"target": None}, "not a target"),
    ],
)
def test_impossible_goals_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Goal(**({"target": PyTorch()} | settings))


def test_a_goal_keeps_what_it_was_given() -> None:
    goal = Goal(target=PyTorch(), limits=(Latency(0.4), Bytes(1e6)), minutes=3)
    assert goal.max_drop == 0.01 and goal.objective == "latency" and len(goal.limits) == 2
