"""A cut that is proven before it is kept: groups that do not pass are left whole, as few of them as will do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from gracile.errors import ConfigError, NothingChangedError
from gracile.graph import CutCheck, Trace, check_cut, plan_resize, tied_sets
from gracile.recipe import Recorder
from gracile.steps.pruning.budget import Keep, cut_copy
from gracile.surgery import Resize, apply


def cut_checked(
    model: nn.Module, traced: Trace, keep: Keep, run: Callable[[nn.Module], Any], recorder: Recorder
) -> tuple[Keep, Resize]:
    """Cut the model in place after proof on a trial copy; gives the groups cut and the edit.

    Groups whose cut is exact must together give the outputs of the zeroed original (float64); with the others the model
    must run and give finite outputs of the same shapes. Groups that do not pass are recorded with the reason. Raises
    NothingChangedError where none passes.
    """
    trials = _Trials(model, traced, keep, run)
    # Groups that must keep the same count are cut together or not at all.
    sets = [tuple(g.name for g in members) for members in tied_sets(map(traced.group, keep)).values()]
    exact = [s for s in sets if all(traced.group(name).exact is None for name in s)]
    passed, check = trials.settle(exact, [])
    error = check.max_error if check is not None else None
    inexact = [s for s in sets if s not in exact]
    if inexact:
        passed, check = trials.settle(inexact, passed)
    for names, reason in trials.failed:
        for name in names:
            recorder.skip(name, traced.group(name).kind, reason)
    if not passed:
        raise NothingChangedError(
            f"Prune: these groups cannot be cut so that the model still works: "
            f"{trials.failed[0][1] if trials.failed else 'no group is left'}.\n"
            f"  `gracile inspect` shows the groups; exclude some, or use another pattern."
        )
    keep = trials.kept(passed)
    edit = plan_resize(traced, keep)
    apply(model, [edit])
    if error is not None:
        recorder.numbers["cut_error"] = error
        recorder.notes.append(_proof(passed, inexact))
    if any(s in passed for s in inexact) and check is not None:
        reasons = dict.fromkeys(traced.group(n).exact or "" for s in passed if s in inexact for n in s)
        recorder.notes.append(
            f"The cut model is not the zeroed original exactly, as expected: {'; '.join(filter(None, reasons))}."
        )
    return keep, edit


def _proof(passed: Sequence[tuple[str, ...]], inexact: Sequence[tuple[str, ...]]) -> str:
    proven = [s for s in passed if s not in inexact]
    if len(proven) == len(passed):
        return "The cut model equals the original with the same units zeroed (float64)."
    return (
        f"Cut without the groups that are not exact, the model equals the original with the same units zeroed "
        f"(float64): {sum(map(len, proven))} of {sum(map(len, passed))} groups."
    )


class _Trials:
    """Trial cuts of a model, none of which changes it."""

    def __init__(self, model: nn.Module, traced: Trace, keep: Keep, run: Callable[[nn.Module], Any]) -> None:
        self.model, self.traced, self.keep, self.run = model, traced, keep, run
        self.failed: list[tuple[tuple[str, ...], str]] = []

    def kept(self, sets: Iterable[tuple[str, ...]]) -> Keep:
        """What is kept of the groups in these sets, in the order in which they were chosen."""
        names = set(itertools.chain.from_iterable(sets))
        return {name: kept for name, kept in self.keep.items() if name in names}

    def settle(
        self, sets: list[tuple[str, ...]], base: list[tuple[str, ...]]
    ) -> tuple[list[tuple[str, ...]], CutCheck | None]:
        """The sets that pass on top of those in `base`, which does, and the last check that passed."""
        if not sets:
            return base, None
        check, reason = self._try([*base, *sets])
        if reason is None:
            return [*base, *sets], check
        if len(sets) == 1:
            self.failed.append((sets[0], reason))
            return base, None
        half = len(sets) // 2
        passed, first = self.settle(sets[:half], base)
        passed, second = self.settle(sets[half:], passed)
        return passed, second or first

    def _try(self, sets: list[tuple[str, ...]]) -> tuple[CutCheck | None, str | None]:
        """The check of a trial cut, and why it does not pass."""
        keep = self.kept(sets)
        try:
            trial = cut_copy(self.model, self.traced, keep)
        except ConfigError as error:  # groups that cannot be cut together
            return None, str(error).partition("\n")[0].rstrip(".:")
        check = check_cut(self.model, trial, self.traced, keep, self.run)
        exact = all(self.traced.group(name).exact is None for name in keep)
        if not check.ran or check.max_error is None:
            return check, check.reason or "the cut model does not run"
        if exact and not check.exact:
            return check, check.reason
        if not check.finite:
            return check, "the cut model's outputs are not finite"
        return check, None
