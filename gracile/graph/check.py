"""Proof of a cut: the cut model against the original with the same units zeroed, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import first_line
from gracile.graph.float64 import Change, computing_in_float64
from gracile.graph.plan import Keep, checked_groups
from gracile.graph.trace import Trace
from gracile.graph.values import tensors_in
from gracile.modes import unchanged

#: Error of float64 arithmetic that a different order of summation may cause, relative to the largest output.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class CutCheck:
    """What running the cut model showed.

    ran: whether it ran. max_error: largest difference to the zeroed original, relative to the largest output where that
    exceeds 1; None if it did not run. exact: whether it is within 1e-10. reason: why it is not, or why it did not run.
    finite: whether its outputs are finite wherever those of the zeroed original are.
    """

    ran: bool
    max_error: float | None
    exact: bool
    reason: str | None
    finite: bool = True


def check_cut(
    original: nn.Module, cut: nn.Module, trace: Trace, keep: Keep, run: Callable[[nn.Module], Any]
) -> CutCheck:
    """Compare the cut model with the original whose units are zeroed in every consumer; neither model is changed."""
    groups = checked_groups(trace, keep)
    found = check_change(original, _zeroing(trace, keep), cut, run, "cut")
    reasons = dict.fromkeys(group.exact for group in groups.values() if group.exact is not None)
    if found.exact or found.max_error is None or not reasons:
        return found
    return replace(found, reason="; ".join(reasons))


def check_change(
    original: nn.Module,
    changes: Mapping[str, Change],
    changed: nn.Module,
    run: Callable[[nn.Module], Any],
    how: str,
) -> CutCheck:
    """Compare a changed model with the original whose tensors are changed alike; neither model is altered.

    changes: name of a parameter or buffer of the original -> what is done to its float64 copy. how: "cut", for reasons.
    """
    try:
        with unchanged(changed), torch.no_grad():
            run(changed)  # as it will run: a kernel may refuse sizes that float64 takes
    except Exception as error:  # whatever the model's own code raises is the finding
        return CutCheck(False, None, False, f"the {how} model does not run: {first_line(error)}")
    with unchanged(original), _same_chance(), computing_in_float64(original, changes):
        expected = [_as_double(t) for t in tensors_in(run(original))]
    try:
        with unchanged(changed), _same_chance(), computing_in_float64(changed):
            found = [_as_double(t) for t in tensors_in(run(changed))]
    except Exception as error:  # whatever the model's own code raises is the finding
        return CutCheck(False, None, False, f"the {how} model does not run: {first_line(error)}")
    if [t.shape for t in expected] != [t.shape for t in found]:
        return CutCheck(True, None, False, f"the {how} model's outputs have other shapes")
    differences = [_difference(a, b) for a, b in zip(expected, found) if a.numel()]
    relative = float(torch.tensor([0.0, *differences], dtype=torch.float64).max())  # NaN where any is
    if relative <= TOLERANCE:
        return CutCheck(True, relative, True, None)
    finite = all(bool((b.isfinite() | ~a.isfinite()).all()) for a, b in zip(expected, found))
    return CutCheck(True, relative, False, f"the {how} model computes something else", finite)


@contextmanager
def _same_chance() -> Iterator[None]:
    """A forward that draws random numbers draws the same ones in every run; the caller's state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest entry where that exceeds 1; equal infinities and NaNs agree."""
    same = (expected == found) | (expected.isnan() & found.isnan())
    if bool(same.all()):
        return 0.0
    scale = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
    largest = float((expected - found)[~same].abs().max())
    return largest / max(scale, 1.0)


def zero_units(model: nn.Module, trace: Trace, keep: Keep) -> None:
    """Set the units that are not kept to zero in every weight that consumes them, in place."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, change in _zeroing(trace, keep).items():
            change(tensors[name])


def _zeroing(trace: Trace, keep: Keep) -> dict[str, Callable[[Tensor], None]]:
    """Name of a weight -> what sets the units that are not kept to zero in it."""
    slices: dict[str, list[tuple[int, Tensor]]] = {}
    for name, group in checked_groups(trace, keep).items():
        gone = sorted(set(range(group.units)) - set(keep[name]))
        for member in group.members:
            if member.role == "consumer" and (member.tensor, member.axis) not in trace.directions:
                slices.setdefault(member.tensor, []).append((member.axis, member.positions[gone].flatten()))

    def zero(parts: list[tuple[int, Tensor]], tensor: Tensor) -> None:
        for axis, positions in parts:
            tensor.index_fill_(axis, positions.to(tensor.device), 0)

    return {name: functools.partial(zero, parts) for name, parts in slices.items()}


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()
