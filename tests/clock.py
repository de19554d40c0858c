"""A runtime without a clock: what a call takes is computed from the model's widths, so that tests are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from torch import nn

from gracile.evaluate.latency import Relative
from gracile.steps.latency import timing
from gracile.targets import PyTorch


class Clockwork(PyTorch):
    """Its runners return how many milliseconds they would take: cost(model)."""

    name: ClassVar[str] = "clockwork"  # type: ignore[misc]

    def __init__(self, cost: Callable[[Any], float]) -> None:
        super().__init__()
        self.__dict__.update(cost=cost, exported=[], fed=[], examples=[], feeds=[])

    def export(self, model: nn.Module, example: Any, path: Any, *, feed: Any = None) -> Any:
        self.exported.append(copy.deepcopy(model))  # type: ignore[attr-defined]
        self.feeds.append(feed)  # type: ignore[attr-defined]
        return path

    def load(self, path: Any) -> Any:
        model = self.exported[-1]  # type: ignore[attr-defined]

        def run(batch: Any) -> float:
            self.fed.append(batch)  # type: ignore[attr-defined]
            return float(self.cost(model))  # type: ignore[attr-defined]

        return run


def without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let times be what the runners of `Clockwork` return."""

    def relative(reference: Callable[[], float], candidate: Callable[[], float], **_: Any) -> Relative:
        whole = reference()
        return Relative(candidate() / whole, 0.0, whole, 1)

    monkeypatch.setattr(timing, "measure_relative", relative)
