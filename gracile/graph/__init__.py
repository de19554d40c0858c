"""Which tensor axes of a model are tied, so that one neuron, head or channel can be cut everywhere at once."""

from __future__ import annotations

from gracile.graph.blocks import Block, find_blocks
from gracile.graph.check import CutCheck, check_change, check_cut
from gracile.graph.groups import Group, Member, tied_sets
from gracile.graph.plan import cut_macs, plan_resize
from gracile.graph.trace import LayerInfo, Trace, trace

__all__ = [
    "Block",
    "CutCheck",
    "Group",
    "LayerInfo",
    "Member",
    "Trace",
    "check_change",
    "check_cut",
    "cut_macs",
    "find_blocks",
    "plan_resize",
    "tied_sets",
    "trace",
]
