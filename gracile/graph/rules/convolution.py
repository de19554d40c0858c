"""Convolutions: grouped ones see their channels as (groups, channels of a group), and the weight holds the second."""

from __future__ import annotations

from gracile.graph.algebra import split_expr, unify
from gracile.graph.axes import COUNTS_KERNEL, Expr, freeze
from gracile.graph.recorder import Call, Rule, Unfollowed
from gracile.graph.rules.base import meet, spatial


def convolution(call: Call) -> None:
    """[n, in, …] with weight [out, in/groups, …], or [in, out/groups, …] where transposed."""
    x, weight = call.value(call["input"]), call.value(call["weight"])
    groups, transposed = call["groups"], call.get("transposed") or False
    recorder = call.recorder
    for dim in weight.dims[2:]:
        freeze(dim, COUNTS_KERNEL)
    for dim in x.dims[2:]:
        freeze(dim, "a convolution slides along it")
    if groups > 1:
        outer, channels = _split(x.dims[1], groups)
        weight_outer, first = _split(weight.dims[0], groups)
        outer = meet(outer, weight_outer)
    else:
        outer, channels, first = (), x.dims[1], weight.dims[0]
    consumed, produced = (first, weight.dims[1]) if transposed else (weight.dims[1], first)
    unify(channels, consumed)
    recorder.contract(weight, 0 if transposed else 1)
    recorder.produce(weight, 1 if transposed else 0)
    if groups > 1:
        recorder.produce(weight, 0)
    out: Expr = (*outer, *produced)
    if call.get("bias") is not None:
        out = meet(out, call.dims(call["bias"])[0])
    counted = x.dims[2:] if transposed else [spatial(n) for n in call.output.shape[2:]]
    recorder.count(x.dims[0], *counted, out, channels, *weight.dims[2:])
    call.set(call.output, [x.dims[0], out, *(spatial(n) for n in call.output.shape[2:])])


def _split(dim: Expr, groups: int) -> tuple[Expr, Expr]:
    halves = split_expr(dim, groups)
    if halves is None:
        raise Unfollowed("the groups of a convolution cut across its structure")
    return halves


def im2col(call: Call) -> None:
    """Patches: [n, c, h, w] → [n, c·kh·kw, positions]."""
    batch, channels, *_ = call.dims(call["self"])
    kernel = call.output.shape[1] // call["self"].shape[1]
    inner = spatial(kernel)
    call.set(call.output, [batch, (*channels, *inner), spatial(call.output.shape[2])])


RULES: dict[str, Rule] = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"), convolution),
    "im2col": im2col,
}
