"""What each operator does to axes, one rule per operator, by the operator's name in the dispatcher."""

from __future__ import annotations

from typing import Any

import torch

from gracile.graph.recorder import Rule
from gracile.graph.rules import (
    attention,
    contraction,
    convolution,
    factory,
    indexing,
    layout,
    norm,
    parts,
    pointwise,
    pooling,
    recurrent,
    reduction,
)

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **layout.RULES,
    **parts.RULES,
    **contraction.RULES,
    **convolution.RULES,
    **norm.RULES,
    **pooling.RULES,
    **reduction.RULES,
    **attention.RULES,
    **recurrent.RULES,
    **indexing.RULES,
    **factory.RULES,
}


def rule_for(name: str, func: Any) -> Rule | None:
    """The rule of an operator; elementwise operators, which the dispatcher tags, share one. None: it has no rule."""
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in func.tags:
        return pointwise.pointwise
    return rule
