"""Proof of a cut: the cut model against the original with the same units zeroed, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.graph.plan import Keep, checked_groups
from gracile.graph.recorder import tensors_in
from gracile.graph.trace import Trace

#: Error of float64 arithmetic that a different order of summation may cause, relative to the largest output.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class CutCheck:
    """What running the cut model showed.

    ran: whether it ran. max_error: largest difference to the zeroed original, relative to the largest output where that
    exceeds 1; None if it did not run. exact: whether it is within 1e-10. reason: why it is not, or why it did not run.
    """

    ran: bool
    max_error: float | None
    exact: bool
    reason: str | None


def check_cut(
    original: nn.Module, cut: nn.Module, trace: Trace, keep: Keep, run: Callable[[nn.Module], Any]
) -> CutCheck:
    """Compare the cut model with the original whose units are zeroed in every consumer; neither model is changed."""
    groups = checked_groups(trace, keep)
    zeroed = _double(original)
    zero_units(zeroed, trace, keep)
    with _float64(), torch.no_grad():
        expected = [_as_double(t) for t in tensors_in(run(zeroed))]
        try:
            found = [_as_double(t) for t in tensors_in(run(_double(cut)))]
        except Exception as error:  # whatever the model's own code raises is the finding
            return CutCheck(False, None, False, f"the cut model does not run: {type(error).__name__}: {error}")
    if [t.shape for t in expected] != [t.shape for t in found]:
        return CutCheck(True, None, False, "the cut model's outputs have other shapes")
    scale = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    largest = max((float((a - b).abs().max()) for a, b in zip(expected, found) if a.numel()), default=0.0)
    relative = largest / max(scale, 1.0)
    if relative <= TOLERANCE:
        return CutCheck(True, relative, True, None)
    reasons = dict.fromkeys(group.exact for group in groups.values() if group.exact is not None)
    return CutCheck(True, relative, False, "; ".join(reasons) or "the cut model computes something else")


def zero_units(model: nn.Module, trace: Trace, keep: Keep) -> None:
    """Set the units that are not kept to zero in every weight that consumes them, in place."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, group in checked_groups(trace, keep).items():
            gone = sorted(set(range(group.units)) - set(keep[name]))
            for member in group.members:
                if member.role == "consumer":
                    tensor = tensors[member.tensor]
                    tensor.index_fill_(member.axis, member.positions[gone].flatten().to(tensor.device), 0)


def _double(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval().double()
    twin.register_forward_pre_hook(_cast, with_kwargs=True)
    return twin


def _cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _map(args), _map(kwargs)


def _map(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _map(value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_map(item) for item in tree)
    return tree


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


@contextmanager
def _float64() -> Iterator[None]:
    """Tensors that a forward makes from nothing are float64 too, for as long as the check runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
