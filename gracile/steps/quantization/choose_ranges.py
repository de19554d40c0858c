"""Range methods compared for each layer's inputs, by what the layer gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Data
from gracile.formats import Int, Scheme, is_dynamic
from gracile.layer_stats import LayerStats
from gracile.modes import eval_mode
from gracile.nn.ops import quantize_dequantize
from gracile.ranges import Automatic
from gracile.ranges.base import Range


def choose_ranges(
    model: nn.Module,
    schemes: Mapping[str, tuple[Scheme, ...]],
    stats: Mapping[str, LayerStats],
    smoothing: Mapping[str, Tensor],
    ranges: Automatic,
    data: Data,
) -> dict[tuple[str, Int], Range]:
    """(layer, format of its inputs) -> the candidate by which the float layer's outputs change least.

    schemes: of each layer those it may take. stats: with the histograms of inputs. smoothing: layer -> what its inputs
    are divided by before they are rounded.
    """
    grids: dict[str, dict[tuple[Int, Range], tuple[Tensor, Tensor]]] = {}
    for name, options in schemes.items():
        histogram = stats[name].input if name in stats else None
        formats = {scheme.input for scheme in options if isinstance(scheme.input, Int) and not is_dynamic(scheme.input)}
        if histogram is not None:
            grids[name] = {(fmt, r): r.activation(histogram, fmt) for fmt in formats for r in ranges.candidates}
    errors = {name: dict.fromkeys(tried, 0.0) for name, tried in grids.items()}

    def on_output(name: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
            divisor = smoothing.get(name)
            x = args[0] if divisor is None else args[0] / divisor
            for (fmt, candidate), (scale, zero) in grids[name].items():
                rounded = quantize_dequantize(x, scale.to(x.device), zero.to(x.device), fmt.qmin, fmt.qmax)
                rounded = rounded if divisor is None else rounded * divisor
                difference = type(layer).forward(layer, rounded) - output
                errors[name][fmt, candidate] += float(difference.float().square().sum())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(on_output(name)) for name in grids]
    try:
        with eval_mode(model), torch.no_grad():
            for batch in islice(data.calibration_batches, ranges.batches):
                data.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        (name, fmt): min(ranges.candidates, key=lambda r: errors[name][fmt, r])
        for name, tried in grids.items()
        for fmt in {fmt for fmt, _ in tried}
    }


def describe_ranges(chosen: Mapping[tuple[str, Int], Range]) -> str:
    """How many layers took which candidate."""
    counts = Counter(str(candidate) for candidate in chosen.values())
    return f"Ranges of inputs: {', '.join(f'{name} for {count}' for name, count in counts.most_common())}."
