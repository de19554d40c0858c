"""Models measured where they will run: exported, judged on the evaluation data, timed interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data, batch_size, slice_batch
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.evaluate.parity import measure_parity
from gracile.evaluate.quality import Values, collect, quality
from gracile.evaluate.size import bits_per_weight, count_parameters, file_bytes, state_bytes
from gracile.graph import trace
from gracile.nn import QuantizedLayer
from gracile.report.model import Measurement
from gracile.report.plain import plain


@dataclass(frozen=True)
class Subject:
    """A model to measure, and on which target; None: PyTorch's own reference execution, not timed."""

    label: str
    model: nn.Module
    target: Any = None


@dataclass(frozen=True)
class Measured:
    """What `measure` found for one subject.

    measurements: one for each batch size timed. values: per-example values of the metric, or None without evaluation.
    predict: batch -> outputs on the target. path: the exported file, or None. parity: the target's outputs against
    the subject's own in PyTorch, as plain data; None for the reference.
    """

    subject: Subject
    measurements: tuple[Measurement, ...]
    values: Values | None
    predict: Callable[[Batch], Any]
    path: Path | None
    parity: dict[str, Any] | None


def measure(
    subjects: Sequence[Subject | Measured],
    data: Data,
    directory: Path,
    *,
    batch_sizes: Sequence[int | None] = (None,),
    seconds: float = 4.0,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Measured]:
    """Export each subject to its target below `directory`, then measure parity, quality, sizes and latency.

    subjects: what an earlier call made of one is timed again as it is, beside the others.
    batch_sizes: of the latency; None: the first evaluation (or calibration) batch as it is. For each, all subjects
    with a target are timed in turn, in random order, for about `seconds` together.
    """
    example = example_batch(data)
    prepared = []
    for i, subject in enumerate(subjects):
        if isinstance(subject, Measured):
            prepared.append(subject)
            continue
        if on_progress is not None:
            on_progress(f"measure {subject.label}", i, len(subjects))
        prepared.append(_prepare(subject, data, example, directory, i, seed))
    timed: dict[int, list[Measurement]] = {i: [] for i in range(len(subjects))}
    for size in batch_sizes:
        batch = resize_batch(example, size) if size is not None else example
        runners = {str(i): _timed_call(p, batch) for i, p in enumerate(prepared) if p.path is not None}
        latencies = measure_latency(runners, seconds=seconds) if runners else {}
        for i, p in enumerate(prepared):
            latency = latencies.get(str(i))
            timed[i].append(
                replace(
                    p.measurements[0],
                    batch_size=batch_size(batch),
                    latency_p50_ms=latency.p50_ms if latency else None,
                    latency_p95_ms=latency.p95_ms if latency else None,
                    latencies_ms=tuple(round(t, 4) for t in latency.times_ms) if latency else (),
                )
            )
    return [replace(p, measurements=tuple(timed[i])) for i, p in enumerate(prepared)]


def example_batch(data: Data) -> Batch:
    """The first batch of the evaluation data, or of the calibration data."""
    batches = data.evaluation if data.evaluation is not None else data.calibration_batches
    return next(iter(batches))


def resize_batch(batch: Batch, size: int) -> Batch:
    """A batch of `size` examples, cut from the batch or made by repeating its examples."""
    have = batch_size(batch)
    if size <= have:
        return slice_batch(batch, 0, size)
    repeats = -(-size // have)

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == have:
            return leaf.repeat(repeats, *[1] * (leaf.ndim - 1))
        return leaf

    return slice_batch(torch.utils._pytree.tree_map(repeat, batch), 0, size)


def _prepare(subject: Subject, data: Data, example: Batch, directory: Path, index: int, seed: int) -> Measured:
    model, target = subject.model.eval(), subject.target
    path, parity = None, None
    if target is None:

        def predict(batch: Batch) -> Any:
            return data.forward(model, batch)
    else:
        folder = directory / f"{index:02d}-{target.name}"
        folder.mkdir(parents=True, exist_ok=True)
        path = target.export(model, example, folder / f"model{target.suffix}", feed=data.feed)
        runner = target.load(path)

        def predict(batch: Batch) -> Any:
            return runner(data.feed(batch) if data.feed is not None else batch)

        with torch.no_grad():
            parity = {
                "target": target.name,
                "label": subject.label,
                **plain(measure_parity(data.forward(model, example), predict(example))),
            }
    values = None
    described = None
    if data.evaluation is not None and data.metric is not None:
        with torch.no_grad():
            values = collect(predict, data.evaluation, data.metric)
        described = plain(quality(data.metric, values, seed=seed))
    measurement = Measurement(
        label=subject.label,
        target=getattr(target, "name", "pytorch reference"),
        precision=_precision(model, target),
        threads=getattr(target, "threads", None) or torch.get_num_threads(),
        quality=described,
        file_bytes=file_bytes(path) if path is not None else None,
        memory_bytes=state_bytes(model),
        bits_per_weight=bits_per_weight(model),
        parameters=count_parameters(model).total,
        macs=trace(model, lambda net: data.forward(net, example)).macs,
        instruction_set=instruction_set(),
    )
    return Measured(subject, (measurement,), values, predict, path, parity)


def _precision(model: nn.Module, target: Any) -> str:
    """The runtime's mode, after the integers that quantized layers compute in."""
    mode = str(getattr(target, "precision", "f32"))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    bits = sorted({layer.input_format.bits for layer in layers if layer.input_format is not None})
    return " + ".join([*(f"int{b}" for b in bits), mode])


def _timed_call(measured: Measured, batch: Batch) -> Callable[[], Any]:
    return lambda: measured.predict(batch)
