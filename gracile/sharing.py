"""Parameters held in more than one place: by copies of a model, and by layers of one."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def share_parameters(model: nn.Module) -> nn.Module:
    """A deep copy of all but the numbers of the parameters, which it reads where the model keeps them.

    Its `nn.Parameter`s are objects of their own, so that gradients, flags and what is put in their place are not the
    model's. Buffers are copied, since a forward may write into them; parameters of other classes too. Whoever writes
    into a parameter, of either, calls `own_parameters` first.
    """
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, shared)


def own_parameters(model: nn.Module, *others: nn.Module) -> None:
    """Give the model numbers of its own wherever a parameter of it reads those of another; tied ones stay tied."""
    theirs = {_place(p) for other in others for p in other.parameters()}
    for parameter in model.parameters():
        if _place(parameter) in theirs:
            parameter.data = parameter.data.clone()


def tied_groups(model: nn.Module, parameter: str | None = None) -> list[list[str]]:
    """Names of the modules that hold the very same parameter as their own, of every parameter that several hold.

    parameter: what it is called in all of them; None: whatever it is called.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, held in module._parameters.items():
            if held is not None and parameter in (None, key):
                holders.setdefault(id(held), []).append(name)
    return [names for names in holders.values() if len(names) > 1]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
