"""Export a model to a runtime, and prove there that it still computes the same, and how fast."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracile.data import Batch, Data, batch_size, call_model
from gracile.environment import has_int8_dot_product
from gracile.errors import ModelError, TargetError
from gracile.evaluate.latency import Latency, measure_latency
from gracile.evaluate.parity import Parity, measure_parity
from gracile.formats import Format, Int, MidRise, format_title
from gracile.modes import eval_mode
from gracile.nn import EncodedWeight, QuantizedLayer, QuantizedRecurrent
from gracile.targets.base import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportEvidence:
    """What an export was found to be.

    path: the file. size_bytes: of it and the files beside it that hold its weights. parity: of the target's outputs on
    the example with PyTorch's. latency: of the example batch, by name: "pytorch" and the target, interleaved; `ratio`
    is how many times faster than PyTorch. notes: what to know of these figures.
    """

    path: Path
    target: str
    size_bytes: int
    parity: Parity
    latency: dict[str, Latency]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "target": self.target,
            "size_bytes": self.size_bytes,
            "parity": self.parity.to_json(),
            "latency": {name: latency.to_json() for name, latency in self.latency.items()},
            "notes": list(self.notes),
        }


def export(
    model: nn.Module,
    target: Target,
    path: str | Path,
    example: Batch,
    data: Data | None = None,
    *,
    seconds: float = 3.0,
) -> ExportEvidence:
    """Write the model for the target, load it back there, and compare it with PyTorch on the example batch.

    example: a batch as the model is fed in use; its batch size is the one timed. data: for its `feed` only.
    seconds: of timing. The model is not changed. Raises TargetError where the target is absent or cannot take the
    model, ModelError where `model` is not one.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"export: expected a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(target, Target):
        raise TargetError(f"export: expected a target such as OnnxRuntime(), got {target!r}.")
    reason = target.available()
    if reason is not None:
        raise TargetError(f"{type(target).__name__} cannot be used here: {reason}")
    feed = data.feed if data is not None else None
    written = target.export(model, example, path, feed=feed)
    runner = target.load(written)
    fed = feed(example) if feed is not None else example
    with eval_mode(model), torch.inference_mode():
        parity = measure_parity(call_model(model, example, feed), runner(fed))
        latency = measure_latency(
            {"pytorch": lambda: call_model(model, example, feed), target.name: lambda: runner(fed)},
            seconds=seconds,
            precision={"pytorch": "f32", target.name: str(getattr(target, "precision", "f32"))},
            threads=getattr(target, "threads", None) or torch.get_num_threads(),
            batch_size=batch_size(example),
        )
    logger.info("%s: %s, %.3g of %.3g off at most", target.name, written, parity.max_error, parity.scale)
    beside = written.with_name(f"{written.name}.data")
    size = sum(file.stat().st_size for file in (written, beside) if file.exists())
    return ExportEvidence(
        path=written, target=target.name, size_bytes=size, parity=parity, latency=latency, notes=_notes(model, target)
    )


def _in_eight_bits(fmt: Format) -> bool:
    """Whether the file holds the weights as signed integers that take all eight bits."""
    if isinstance(fmt, MidRise):
        return fmt.bits == 7  # its odd levels take one more
    return isinstance(fmt, Int) and (fmt.bits, fmt.symmetric) == (8, True)


def _notes(model: nn.Module, target: Target) -> tuple[str, ...]:
    """What the file does not keep in few bits, and 8-bit weights where kernels add two products in 16 bits."""
    recurrent = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedRecurrent)}
    integer = [name for name, layer in recurrent.items() if layer.dynamic and target.capabilities.integer_lstms]
    overflowing = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and layer.input_format is not None and _in_eight_bits(layer.weight_format)
    ]
    overflowing += [name for name in integer if _in_eight_bits(recurrent[name].weight_format)]
    floating = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and not isinstance(layer, EncodedWeight)
        if not isinstance(layer.weight_format, (Int, MidRise))
    ]
    notes = []
    decoded = [name for name in recurrent if name not in integer]
    if decoded:
        notes.append(
            f"The weights of {', '.join(decoded)} are decoded in the file: {target.name} does not compute them in few "
            f"bits. They are small in the saved model only."
        )
        rounded = [name for name in decoded if recurrent[name].dynamic]
        if rounded:
            notes.append(
                f"Inputs and states of {', '.join(rounded)} are rounded to 8 bits in PyTorch, not in the file."
            )
    if floating and target.suffix == ".onnx":
        titles = sorted({format_title(model.get_submodule(name).weight_format) for name in floating})  # type: ignore[arg-type]
        notes.append(
            f"{len(floating)} layers ({', '.join(titles)}) are written as floating point: no kernel takes these "
            f"formats. They are small in the saved model only."
        )
    if overflowing and not has_int8_dot_product():
        notes.append(
            f"{len(overflowing)} layers have 8-bit weights beside 8-bit inputs. This processor has no VNNI: its "
            f"kernels add two products in 16 bits, which such weights overflow. Quantize with gracile.formats.W7A8 or "
            f"W7A8Dynamic."
        )
    return tuple(notes)
