"""Which linear layers are smoothed, and by what: one decision for all layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.equalize import InputScales
from gracile.formats import Int, Scheme, is_dynamic
from gracile.layer_stats import LayerStats
from gracile.nn.ops import quantize_dequantize, quantize_dequantize_per_token
from gracile.ranges import MinMax
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.stats.collect import collect_activations
from gracile.stats.histogram import StreamingHistogram
from gracile.steps.quantization.grids import nearest_codes


def smooth(
    model: nn.Module,
    layers: Sequence[str],
    equalize: InputScales,
    scheme: Scheme,
    ranges: Range,
    context: Context,
    recorder: Recorder,
) -> dict[str, Tensor]:
    """Linear layer -> the scales [in] that divide its inputs and multiply its weight; layers that keep theirs are out.

    One pass over the calibration data. Candidates are compared with the weight rounded over its full range, for a
    search of every range for every candidate would take minutes and moves all of them alike.
    """
    linear = [name for name in layers if isinstance(model.get_submodule(name), nn.Linear)]
    if not linear:
        return {}
    stats = collect_activations(
        model,
        linear,
        {"input_peak", "input_rows"},
        context.data,
        on_batch=lambda n: context.progress("smooth", n, None),
    )
    found: dict[str, Tensor] = {}
    for group in same_inputs(stats):
        peak, rows = stats[group[0]].input_peak, stats[group[0]].input_rows
        assert peak is not None and rows is not None
        weight = torch.cat([model.get_submodule(name).weight.detach().float() for name in group])  # type: ignore[operator,union-attr]
        scale = equalize(weight, peak, rows, lambda w, x: _rounded(w, x, scheme, ranges))
        if scale is not None:
            found |= dict.fromkeys(group, scale)
    recorder.layers.extend(LayerRow(name=n, kind="Linear", action="smoothed") for n in linear if n in found)
    recorder.notes.append(f"{type(equalize).__name__}: {len(found)} of {len(linear)} linear layers are smoothed.")
    return found


def same_inputs(stats: dict[str, LayerStats]) -> list[list[str]]:
    """Layers by the tensor they read, told by what was seen of it: query, key and value of an attention are one set."""
    groups: list[list[str]] = []
    for name, record in stats.items():
        for group in groups:
            other = stats[group[0]]
            assert record.input_rows is not None and other.input_rows is not None
            if record.input_rows.shape == other.input_rows.shape and torch.equal(record.input_rows, other.input_rows):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _rounded(weight: Tensor, inputs: Tensor, scheme: Scheme, ranges: Range) -> tuple[Tensor, Tensor]:
    weight = scheme.weight.decode(nearest_codes(weight, scheme.weight, MinMax()))
    if not isinstance(scheme.input, Int):
        return weight, inputs
    if is_dynamic(scheme.input):
        return weight, quantize_dequantize_per_token(inputs, scheme.input.qmax)
    histogram = StreamingHistogram()
    histogram.update(inputs)
    scale, zero_point = ranges.activation(histogram.freeze(), scheme.input)
    return weight, quantize_dequantize(inputs, scale.to(inputs), zero_point, scheme.input.qmin, scheme.input.qmax)
