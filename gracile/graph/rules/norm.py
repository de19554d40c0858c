"""Normalization: over the batch it is exact under a cut; over the cut axis itself it is not, and says so."""

from __future__ import annotations

from torch import Tensor

from gracile.graph.algebra import split_expr, unify
from gracile.graph.axes import COUNTS_GROUPS, Expr, freeze, fresh, mark_inexact
from gracile.graph.recorder import Call, Rule, Unfollowed
from gracile.graph.values import Value

STANDARDISED = "a weight is standardised over it"


def batch_norm(call: Call) -> None:
    """Each channel by its own statistics; of a standardised weight, the other dimensions are what it is taken over."""
    x = call["input"]
    dims = list(call.dims(x))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(tensor := call.get(name), Tensor):
            unify(dims[1], call.dims(tensor)[0])
    if call.value(x).is_weight:
        for dim in (dims[0], *dims[2:]):
            mark_inexact(dim, STANDARDISED)
    _with_statistics(call, dims, call.value(x))


def layer_norm(call: Call) -> None:
    """Over the trailing dimensions of `normalized_shape`."""
    x = call["input"]
    dims = list(call.dims(x))
    count = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(tensor := call.get(name), Tensor):
            for dim, own in zip(dims[-count:], call.dims(tensor)):
                unify(dim, own)
    for dim in dims[-count:]:
        mark_inexact(dim, "a layer norm is taken over it")
    _with_statistics(call, dims)


def group_norm(call: Call) -> None:
    """Channels are (groups, channels of a group); statistics are over a group."""
    dims = list(call.dims(call["input"]))
    groups = call["group"]
    halves = split_expr(dims[1], groups)
    if halves is None:
        raise Unfollowed("the groups of a normalization cut across its structure")
    if halves[1]:
        freeze(halves[0], COUNTS_GROUPS)
        mark_inexact(halves[1], "a group norm is taken over it")
    for name in ("weight", "bias"):
        if isinstance(tensor := call.get(name), Tensor):
            unify(dims[1], call.dims(tensor)[0])
    _with_statistics(call, dims)


def _with_statistics(call: Call, dims: list[Expr], like: Value | None = None) -> None:
    """The first output is shaped as the input; the rest are statistics that only a backward pass reads.

    like: what is known of the input, where the output still is a weight if that was one.
    """
    first, *rest = call.outputs
    if like is None:
        call.set(first, dims)
    else:
        call.set(first, dims, like.sources, like.is_weight)
    for output in rest:
        call.set(output, [fresh(n, "it is a statistic of a normalization") for n in output.shape])


def weight_norm(call: Call) -> None:
    """g · v / ‖v‖ over all dimensions but one: a cut of the others changes the norm, and zero v has no direction."""
    value = call.value(call["v"])
    gain = call.value(call["g"])
    for d, (dim, own) in enumerate(zip(value.dims, gain.dims)):
        if own:
            unify(dim, own)
            call.recorder.directions |= value.sources[d]
        else:
            mark_inexact(dim, "a weight norm is taken over it")
    output, *rest = call.outputs
    sources = [a | b for a, b in zip(value.sources, gain.sources)]
    call.set(output, value.dims, sources, value.is_weight)
    for other in rest:
        call.set(other, [fresh(n, "it is a norm of a weight") for n in other.shape])


_BATCH_NORMS = (
    "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm batch_norm "
    "_batch_norm_no_update _batch_norm_with_update miopen_batch_norm"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_BATCH_NORMS.split(), batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
}
