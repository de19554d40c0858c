"""Hidden states of student and teacher: which modules can be compared, and what they gave in the last forward."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import logits_of
from gracile.errors import ConfigError, DataError
from gracile.losses import Hint
from gracile.modes import eval_mode

Forward = Callable[[nn.Module], Any]


@dataclass
class HiddenStates:
    """What the named modules of each of two nets gave last."""

    layers: Sequence[str]
    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watched(self, student: nn.Module, teacher: nn.Module) -> Iterator[HiddenStates]:
        """Keep them, for as long as the context lasts."""
        handles = []
        for net, states in ((student, self.student), (teacher, self.teacher)):
            for name in self.layers:

                def keep(_m: Any, _a: Any, output: Any, name: str = name, states: dict[str, Tensor] = states) -> None:
                    states[name] = logits_of(output)

                handles.append(net.get_submodule(name).register_forward_hook(keep))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.student.clear()
            self.teacher.clear()


def hint_loss(hint: Hint, states: HiddenStates) -> Tensor:
    """The mean over the layers of what the hint says of their last outputs."""
    return torch.stack([hint(states.student[n], states.teacher[n]) for n in states.layers]).mean()


def comparable_layers(
    student: nn.Module, teacher: nn.Module, run: Forward, patterns: tuple[str, ...] | None
) -> list[str]:
    """Modules of both nets, called once in a forward of each, whose outputs have equal shapes.

    run: a forward of either. patterns: which ones; None: those made of other modules, in a net without such its layers,
    never the net itself. Of modules that give the same tensor, the innermost. Raises ConfigError where there is none,
    or none that a pattern names.
    """
    ours, theirs = (_outputs(net, run) for net in (student, teacher))
    both = [name for name in ours if name in theirs]
    equal = [n for n in both if len(ours[n]) == len(theirs[n]) == 1 and ours[n][0].shape == theirs[n][0].shape]
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in equal):
            raise ConfigError(
                f"Hint: '{pattern}' names no module that can be compared.\n  {_why(pattern, ours, theirs)}"
            )
    if patterns is not None:
        chosen = [name for name in equal if any(fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        chosen = [n for n in equal if all(_holds_layers(net.get_submodule(n)) for net in (student, teacher))]
        chosen = chosen or [name for name in equal if _has_own(teacher.get_submodule(name))]
    distinct: dict[int, str] = {}
    for name in chosen:  # a module is called before those around it, which may give the same tensor
        distinct.setdefault(id(ours[name][0]), name)
    if not distinct:
        raise ConfigError(
            "Hint: the model and its teacher have no modules with the same name and outputs of the same shape.\n"
            "  Use losses of the outputs alone, such as SoftLabels(temperature)."
        )
    return list(distinct.values())


def _why(pattern: str, ours: Mapping[str, Sequence[Tensor]], theirs: Mapping[str, Sequence[Tensor]]) -> str:
    """Why a pattern names nothing that can be compared."""
    name = next((name for name in (*ours, *theirs) if fnmatchcase(name, pattern)), None)
    if name is None:
        known = [n for n in ours if n in theirs]
        close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
        return f"No module of that name gives a tensor of real numbers; near it are {', '.join(close) or 'none'}."
    shapes = [[tuple(t.shape) for t in found.get(name, ())] for found in (ours, theirs)]
    return (
        f"'{name}' gives {shapes[0]} in the model and {shapes[1]} in the teacher: outputs must be one each, of equal "
        f"shapes. Hint() takes all that are."
    )


def _outputs(net: nn.Module, run: Forward) -> dict[str, list[Tensor]]:
    """Module -> the main tensor of each of its calls in one forward; modules that give none are left out."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in net.named_modules():
        if name:

            def note(_m: Any, _a: Any, output: Any, name: str = name) -> None:
                try:
                    tensor = logits_of(output)
                except DataError:
                    return
                if tensor.is_floating_point():
                    found.setdefault(name, []).append(tensor)

            handles.append(module.register_forward_hook(note))
    try:
        with eval_mode(net), torch.no_grad():
            run(net)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _holds_layers(module: nn.Module) -> bool:
    """Whether it has no parameters of its own, and a module inside has some."""
    return not _has_own(module) and any(True for _ in module.parameters())


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))
