"""Pooling, interpolation, windows and padding by reflection: dimensions of places change, channels pass."""

from __future__ import annotations

from gracile.graph.axes import freeze, fresh
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import meet, spatial, wrap


def _over_last(count: int) -> Rule:
    def rule(call: Call) -> None:
        dims = call.dims(call.tensors[0])
        for dim in dims[-count:]:
            freeze(dim, f"'{call.name}' mixes its neighbours")
        for output in call.outputs:
            call.set(output, [*dims[:-count], *(spatial(n) for n in output.shape[-count:])])

    return rule


def over_boxes(call: Call) -> None:
    """Pooling over boxes given as data, [boxes, channels, h, w]: a row for each box, and channels pass."""
    _, channels, *places = call.dims(call["input"])
    for dim in (*places, *call.dims(call["rois"])):
        freeze(dim, f"'{call.name}' mixes its neighbours")
    for output in call.outputs:
        sizes = output.shape[2:]
        call.set(output, [fresh(output.shape[0], "it counts boxes"), channels, *(spatial(n) for n in sizes)])


def grid_sample(call: Call) -> None:
    """[n, channels, places] read at points given as data, [n, points, coordinates]: channels pass."""
    batch, channels, *places = call.dims(call["input"])
    examples, *points, coordinates = call.dims(call["grid"])
    for dim in (*places, *points, coordinates):
        freeze(dim, f"'{call.name}' mixes its neighbours")
    sizes = call.output.shape[2:]
    call.set(call.output, [meet(batch, examples), channels, *(spatial(n) for n in sizes)])


def unfold(call: Call) -> None:
    """Windows along one dimension, which becomes their number; what they hold is a new last dimension."""
    tensor, output = call["self"], call.output
    value = call.value(tensor)
    at = wrap(call["dimension"], tensor.ndim)
    freeze(value.dims[at], f"'{call.name}' mixes its neighbours")
    dims = [*value.dims, spatial(output.shape[-1])]
    dims[at] = spatial(output.shape[at])
    call.set(output, dims, [*value.sources, value.sources[at]], value.is_weight)


_FAMILIES = (
    "avg_pool{}d max_pool{}d_with_indices max_pool{}d adaptive_avg_pool{}d _adaptive_avg_pool{}d adaptive_max_pool{}d "
    "fractional_max_pool{}d reflection_pad{}d replication_pad{}d upsample_nearest{}d _upsample_nearest_exact{}d "
    "mkldnn_max_pool{}d mkldnn_adaptive_avg_pool{}d"
)
_PLANAR = "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"

RULES: dict[str, Rule] = {
    **{family.format(n): _over_last(n) for family in _FAMILIES.split() for n in (1, 2, 3)},
    "upsample_linear1d": _over_last(1),
    **dict.fromkeys(_PLANAR.split(), _over_last(2)),
    "upsample_trilinear3d": _over_last(3),
    **dict.fromkeys(("roi_align", "roi_pool"), over_boxes),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sample),
    "unfold": unfold,
}
