"""Tensors made of nothing: constants follow what they meet, counters and random numbers do not."""

from __future__ import annotations

from gracile.graph.axes import fresh
from gracile.graph.recorder import Call, Rule
from gracile.graph.rules.base import follow
from gracile.graph.values import NOWHERE


def constant(call: Call) -> None:
    """One value everywhere: any number of entries will do."""
    call.set(call.output, [fresh(n) for n in call.output.shape], [NOWHERE] * call.output.ndim, True)


def zeros(call: Call) -> None:
    """A constant that may be the initial state of any choice of units."""
    constant(call)
    call.recorder.note_zeros(call.output)


def detach(call: Call) -> None:
    """The same memory again, through which PyTorch hands out every tensor that it makes while being watched."""
    follow(call, call.output, call["self"])
    if call.recorder.is_zeros(call["self"]):
        call.recorder.note_zeros(call.output)


def constant_like(call: Call) -> None:
    """One value everywhere, shaped like another tensor."""
    follow(call, call.output, call["self"])


def counted(call: Call) -> None:
    """Each entry differs by its position, so none can be left out."""
    reason = f"its entries are made by '{call.name}', each for its position"
    call.set(call.output, [fresh(n, reason) for n in call.output.shape], [NOWHERE] * call.output.ndim, True)


_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like"
_CONSTANT = "ones full empty new_ones new_full new_empty scalar_tensor empty_strided new_empty_strided"
_COUNTED = "arange linspace logspace eye rand randn randint randperm tril_indices triu_indices"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_LIKE.split(), constant_like),
    **dict.fromkeys(_CONSTANT.split(), constant),
    **dict.fromkeys(("zeros", "new_zeros"), zeros),
    "detach": detach,
    **dict.fromkeys(_COUNTED.split(), counted),
}
