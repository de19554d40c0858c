"""Pooling, interpolation and padding by reflection: trailing dimensions change, leading ones pass."""

from __future__ import annotations

from gracile.graph.axes import freeze, fresh
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import spatial


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
}
