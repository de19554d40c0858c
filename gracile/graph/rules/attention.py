"""Scaled dot-product attention in its several fused forms."""

from __future__ import annotations

from torch import Tensor

from gracile.graph.algebra import split_expr, unify
from gracile.graph.axes import Expr, freeze, fresh, mark_inexact, mark_kind, size
from gracile.graph.recorder import Call, Rule, Unfollowed
from gracile.graph.rules.base import broadcast, meet
from gracile.graph.rules.contraction import BETWEEN_ACTIVATIONS
from gracile.graph.values import NOWHERE, Value

SCALED = "attention divides its scores by the square root of this size"


def attention(call: Call) -> None:
    """softmax(q·kᵀ·scale + mask)·v with [batch, heads, length, head size]; key heads may be fewer than query heads."""
    q, k, v = (call.dims(call[name]) for name in ("query", "key", "value"))
    batch = meet(meet(q[0], k[0]), v[0])
    keys = meet(k[1], v[1])
    if size(q[1]) == size(keys):
        unify(q[1], keys)
    else:
        halves = split_expr(q[1], size(keys))
        if halves is None:
            raise Unfollowed("query heads do not divide by key heads")
        unify(halves[0], keys)
    mark_kind(q[1], "heads")
    length = meet(k[2], v[2])
    _head_size(call, meet(q[3], k[3]))
    mark_kind(v[3], "head_dim")
    mask = next((call.get(n) for n in ("attn_mask", "attn_bias") if isinstance(call.get(n), Tensor)), None)
    if mask is not None:
        scores = Value([batch, q[1], q[2], length], [NOWHERE] * 4)
        broadcast([scores, call.value(mask)], [size(dim) for dim in scores.dims])
    call.recorder.count(batch, q[1], q[2], length, q[3])
    call.recorder.count(batch, q[1], q[2], length, v[3])
    first, *rest = call.outputs
    call.set(first, [batch, q[1], q[2], v[3]])
    for output in rest:
        call.set(output, _statistics(output, batch, q))


def _head_size(call: Call, dim: Expr) -> None:
    mark_kind(dim, "head_dim")
    if call.get("scale") is None:
        freeze(dim, SCALED)
    else:
        mark_inexact(dim, BETWEEN_ACTIVATIONS)


def _statistics(output: Tensor, batch: Expr, q: list[Expr]) -> list[Expr]:
    """What only a backward pass reads: no axis of it is followed."""
    if output.ndim >= 3 and [size(dim) for dim in (batch, q[1], q[2])] == list(output.shape[:3]):
        return [batch, q[1], q[2], *(fresh(n, "it is a statistic of attention") for n in output.shape[3:])]
    return [fresh(n, "it is a statistic of attention") for n in output.shape]


_FORMS = (
    "flash_attention_for_cpu flash_attention efficient_attention cudnn_attention fused_attention_overrideable "
    "attention_math attention_math_for_mps"
)

RULES: dict[str, Rule] = {f"_scaled_dot_product_{form}": attention for form in _FORMS.split()}
