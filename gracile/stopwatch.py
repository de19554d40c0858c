"""Latencies that a search compares although it measures them minutes apart."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gracile.data import Data
from gracile.measure import Measured, Subject, measure

#: Seconds of measuring for each subject, and for a candidate beside its reference.
EACH, PAIR = 0.7, 2.0


class Stopwatch:
    """Times models on their targets in turn; quality is not measured. References are exported once and kept."""

    def __init__(self, data: Data, batch_size: int | None) -> None:
        self.data = replace(data, evaluation=None, metric=None, calibration=data.calibration_batches)
        self.batch_size = batch_size
        self._references: dict[str, Measured] = {}

    def latencies_ms(self, subjects: Sequence[Subject]) -> dict[str, float]:
        """Median latency by label, interleaved."""
        return {m.subject.label: median_ms(m) for m in self._timed(subjects, EACH * len(subjects))}

    def relative(self, candidate: Subject, key: str, reference: Callable[[], Subject]) -> float:
        """Median latency as a multiple of the reference's, timed in turn: a slower minute slows both.

        key: names the reference, which is made when it is first asked for.
        """
        known = self._references.get(key)
        before, after = self._timed([reference() if known is None else known, candidate], PAIR)
        self._references[key] = before
        return median_ms(after) / median_ms(before)

    def _timed(self, subjects: Sequence[Subject | Measured], seconds: float) -> list[Measured]:
        with tempfile.TemporaryDirectory() as folder:
            return measure(subjects, self.data, Path(folder), batch_sizes=(self.batch_size,), seconds=seconds)


def median_ms(measured: Measured) -> float:
    """Median latency at the first batch size."""
    value = measured.measurements[0].latency_p50_ms
    assert value is not None
    return value
