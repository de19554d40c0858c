"""Range methods chosen by a layer's outputs: against layers built with each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
from gracile.formats import Int, PerTensor
from gracile.ranges import MSE, Automatic, MinMax, Percentile, Range
from gracile.stats.histogram import StreamingHistogram

CANDIDATES: tuple[Range, ...] = (MinMax(), MSE(), Percentile(95.0))
#: Weights that rounding leaves as good as they are, so that inputs alone tell methods apart.
SCHEME = gc.Scheme("inputs of 4 bits", Int(8), Int(4, PerTensor(), symmetric=False))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))


def batches(shape: tuple[int, ...], outlier: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(16, *shape, generator=generator) for _ in range(4)]
    for batch in found:
        batch[0] *= outlier
    return found


@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize(
    ("make", "shape", "smoothed"),
    [(convolution, (3, 6, 6), False), (linear, (48,), False), (linear, (48,), True)],
    ids=["convolution", "linear", "smoothed linear"],
)
def test_the_first_layer_has_the_range_its_outputs_are_best_with(
    make: Any, shape: tuple[int, ...], outlier: float, smoothed: bool
) -> None:
    torch.manual_seed(0)
    model, calibration = make().eval(), batches(shape, outlier)
    data = gc.Data(calibration=calibration)
    settings: dict[str, Any] = {"correct": False}
    if smoothed:
        settings["equalize"] = gc.equalize.SmoothQuant(minimum_gain=1.0)
        for batch in calibration:
            batch[:, 0] *= 10  # a channel that is worth it
    result = gc.compress(model, gc.Quantize(SCHEME, ranges=Automatic(CANDIDATES), **settings), data)
    layer: Any = result.model[0]  # type: ignore[index]
    multiplier = layer.input_multiplier if smoothed else torch.ones(())
    histogram = StreamingHistogram()
    for batch in calibration:
        histogram.update(batch * multiplier)
    errors, scales = {}, {}
    for candidate in CANDIDATES:
        grid = candidate.activation(histogram.freeze(), SCHEME.input)  # type: ignore[arg-type]
        with torch.no_grad():
            codes = [SCHEME.input.quantize(x * multiplier, *grid) for x in calibration[:2]]  # type: ignore[union-attr]
            inputs = [SCHEME.input.dequantize(c, *grid) / multiplier for c in codes]  # type: ignore[union-attr]
            pairs = zip(inputs, calibration, strict=False)
            errors[candidate] = sum(float((model[0](q) - model[0](x)).square().sum()) for q, x in pairs)
        scales[candidate] = float(grid[0])
    best = scales[min(CANDIDATES, key=errors.__getitem__)]
    assert float(layer.input_scale) == pytest.approx(best, rel=1e-4)  # x / (1 / m) and x · m differ in the last bit
    assert any("Ranges of inputs:" in note for note in result.report.steps[0].notes)


def test_values_that_no_output_depends_on_are_clipped() -> None:
    """Squared error of the inputs alone would keep them."""
    model = linear().eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 0  # type: ignore[index,union-attr,operator]
    calibration = batches((48,), 1.0)
    for batch in calibration:
        batch[:, 0] *= 50
    scales = {}
    for ranges in (*CANDIDATES, Automatic(CANDIDATES)):
        found = gc.compress(model, gc.Quantize(SCHEME, ranges=ranges, correct=False), gc.Data(calibration=calibration))
        scales[ranges] = float(found.model[0].input_scale)  # type: ignore[index,union-attr,arg-type]
    assert scales[Automatic(CANDIDATES)] == scales[Percentile(95.0)] < 0.5 * scales[MSE()]
