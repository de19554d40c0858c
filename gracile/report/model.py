"""Report: what was measured before and after, what each step did to each layer, and what was skipped and why."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gracile.errors import ArtifactError
from gracile.files import write_bytes, write_json
from gracile.report.plain import decode, encode
from gracile.surgery import Edit, edit_from_json, edit_to_json

#: Version of the JSON form; a later one that readers of this could misread gets the next number.
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What a step did to one layer; None where a number has no meaning for it.

    kind: its class, "Conv2d". action: "cut", "pruned", "factorized", "quantized", "trained", "folded", "swapped",
        "equalized", "removed", "kept" or "skipped".
    kept, of: channels, heads or neurons kept, of how many; of a factorized layer its rank, of the full one.
    sparsity: fraction of its weights that are zero. bits: stored for one weight, scales included.
    format: of its weight and its inputs, "int4 per channel, inputs uint8 per tensor". range: lowest and highest input
        that has a code. clipped: fraction of the inputs seen in calibration that lie beyond it.
    error: relative error of the layer's output (or weight) after the step; of a block removed or kept, the divergence
        of the model's outputs without it. reason: why it was skipped or cut so.
    """

    name: str
    kind: str
    action: str
    kept: int | None = None
    of: int | None = None
    sparsity: float | None = None
    bits: float | None = None
    format: str | None = None
    range: tuple[float, float] | None = None
    clipped: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step did: its settings as plain data, how long it took, its layers, remarks, numbers and edits."""

    step: dict[str, Any]
    title: str
    seconds: float
    layers: tuple[LayerRow, ...] = ()
    notes: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model measured on a target; None is "not measured".

    label: a name for a person ("original", "compressed").
    quality: value, low, high, examples and name of the metric, as measured on this target.
    latency: median and 95th percentile for one batch of `batch_size`, in milliseconds; latencies_ms: single timings.
    precision: the runtime's own mode ("f32", "bf16"), after the integers that quantized layers
        compute in ("int8 + f32"). instruction_set: the widest one it could use ("avx2").
    file_bytes: the exported file. memory_bytes: parameters and buffers. macs: multiply-accumulates for one example.
    """

    label: str
    target: str
    precision: str = "f32"
    batch_size: int | None = None
    threads: int | None = None
    quality: dict[str, Any] | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latencies_ms: tuple[float, ...] = ()
    file_bytes: int | None = None
    memory_bytes: int | None = None
    bits_per_weight: float | None = None
    parameters: int | None = None
    macs: int | None = None
    instruction_set: str | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that was tried: where it lies between quality and cost, whether it met the goal, and why not."""

    label: str
    quality: float | None = None
    latency_ms: float | None = None
    file_bytes: int | None = None
    met: bool | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Evidence of one compression. Dictionaries hold plain JSON data.

    goal: the limits asked for; `max_drop` and `latency_ms` (the limit in milliseconds) are drawn in the plot.
    before, after: several each where several targets, precisions or batch sizes were measured; see `view.pairs`.
    comparison: of `evaluate.quality.compare`. behaviour: of `evaluate.behaviour`. parity: one for each export.
    met: whether the goal was met; None where there was none. verdict: one line. reason: why the search ended.
    created: a time in ISO 8601.
    """

    title: str
    verdict: str = ""
    reason: str = ""
    met: bool | None = None
    goal: dict[str, Any] | None = None
    before: tuple[Measurement, ...] = ()
    after: tuple[Measurement, ...] = ()
    comparison: dict[str, Any] | None = None
    behaviour: dict[str, Any] | None = None
    steps: tuple[StepRecord, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    parity: tuple[dict[str, Any], ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    created: str = ""

    @property
    def skipped(self) -> tuple[LayerRow, ...]:
        """Layers that steps selected and left as they were, with the reason."""
        return tuple(row for step in self.steps for row in step.layers if row.action == "skipped")

    def to_json(self) -> dict[str, Any]:
        """The report as strict JSON data, read back exactly by `from_json`."""
        steps = [
            {**encode(dataclasses.replace(step, edits=())), "edits": [edit_to_json(edit) for edit in step.edits]}
            for step in self.steps
        ]
        return {"schema": SCHEMA, **encode(dataclasses.replace(self, steps=())), "steps": steps}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The report that `to_json` wrote; raises ArtifactError for anything else, or for a later schema."""
        try:
            schema = data["schema"]
            if isinstance(schema, int) and schema > SCHEMA:
                raise ArtifactError(
                    f"The report has schema {schema}; this version of Gracile reads up to {SCHEMA}.\n"
                    f"  Upgrade it: pip install -U gracile"
                )
            fields = {key: decode(value) for key, value in data.items() if key not in ("schema", "steps")}
            steps = tuple(_step(item) for item in data["steps"])
            return Report(
                **{
                    **fields,
                    "before": tuple(_measurement(m) for m in fields["before"]),
                    "after": tuple(_measurement(m) for m in fields["after"]),
                    "candidates": tuple(Candidate(**c) for c in fields["candidates"]),
                    "parity": tuple(fields["parity"]),
                    "steps": steps,
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"The report cannot be read: {error!r}.") from error

    def save(self, directory: str | Path) -> Path:
        """Write report.json and report.html into the directory, each whole or not at all; returns the HTML file."""
        from gracile.report.html import render_html

        page = render_html(self).encode()
        write_json(Path(directory) / "report.json", self.to_json())
        write_bytes(Path(directory) / "report.html", page)
        return Path(directory) / "report.html"

    @staticmethod
    def load(path: str | Path) -> Report:
        """The report saved in a directory, or in a JSON file; raises ArtifactError."""
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"No report can be read from '{file}': {error}.") from error
        return Report.from_json(data)

    def summary(self) -> str:
        """The verdict and the main figures, before -> after, in one line."""
        from gracile.report.view import summary

        return summary(self)

    def __str__(self) -> str:
        from gracile.report.terminal import render_text

        return render_text(self)

    def _repr_html_(self) -> str:
        from gracile.report.html import render_notebook

        return render_notebook(self)


def _step(data: dict[str, Any]) -> StepRecord:
    fields = {key: decode(value) for key, value in data.items() if key != "edits"}
    rows = tuple(_row(row) for row in fields["layers"])
    edits = tuple(edit_from_json(edit) for edit in data["edits"])
    return StepRecord(**{**fields, "layers": rows, "notes": tuple(fields["notes"]), "edits": edits})


def _row(data: dict[str, Any]) -> LayerRow:
    return LayerRow(**{**data, "range": tuple(data["range"]) if data.get("range") else None})


def _measurement(data: dict[str, Any]) -> Measurement:
    return Measurement(**{**data, "latencies_ms": tuple(data["latencies_ms"])})
