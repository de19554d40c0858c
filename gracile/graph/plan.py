"""From the units that each group keeps to the edit that cuts the model, and what the cut model will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gracile.errors import ConfigError
from gracile.graph.axes import Atom, atoms
from gracile.graph.groups import Group
from gracile.graph.positions import kept_count, kept_mask
from gracile.graph.trace import Trace
from gracile.surgery import Resize

Keep = Mapping[str, Sequence[int]]


def plan_resize(trace: Trace, keep: Keep) -> Resize:
    """The edit that leaves only these units, ascending indices by group name, and mends the integers that size them.

    Raises ConfigError for a group that is unknown or frozen, for indices that are empty, unordered or out of range, and
    for unequal counts where groups must keep the same.
    """
    masks = _masks(trace, keep)
    indices: dict[str, tuple[int, ...]] = {}
    for name, dims in trace.axes.items():
        for axis, dim in enumerate(dims):
            if any(atom in masks for atom in atoms(dim)):
                mask = kept_mask(dim, masks)
                if not bool(mask.all()):
                    indices[f"{name}:{axis}"] = tuple(mask.nonzero().flatten().tolist())
    return Resize(indices, _attributes(trace, masks))


def cut_macs(trace: Trace, keep: Keep) -> int:
    """Multiply-accumulates per example after such a cut: each operator's, at the sizes that its axes then have."""
    counts = _counts(_masks(trace, keep))
    return sum(kept_count(term.volume, counts) for term in trace.mac_terms) // trace.batch_size


def checked_groups(trace: Trace, keep: Keep) -> dict[str, Group]:
    """The groups named, after the checks of `plan_resize`."""
    groups = {name: trace.group(name) for name in keep}
    tied: dict[str, tuple[str, int]] = {}
    for name, group in groups.items():
        units = list(keep[name])
        if group.frozen is not None:
            raise ConfigError(f"Group '{name}' cannot be cut: {group.frozen}.\n  Leave it out.")
        if not units:
            raise ConfigError(f"Group '{name}' would keep none of its {group.units} units.\n  Keep at least one.")
        if units != sorted(set(units)) or units[0] < 0 or units[-1] >= group.units:
            raise ConfigError(
                f"Group '{name}': the units kept must be ascending, different and within 0 … {group.units - 1}, "
                f"got {units[:8]}{'…' if len(units) > 8 else ''}."
            )
        if len(units) % group.multiple_of and len(units) < group.units:
            raise ConfigError(
                f"Group '{name}': {len(units)} units kept are no multiple of {group.multiple_of}; "
                f"a kernel reads them in aligned rows."
            )
        if group.tied_count is not None:
            other, count = tied.setdefault(group.tied_count, (name, len(units)))
            if count != len(units):
                raise ConfigError(
                    f"Groups '{other}' and '{name}' must keep the same number of units "
                    f"({group.tied_count} sizes both), got {count} and {len(units)}."
                )
    _check_whole_ties(trace, groups, tied, keep)
    return groups


def _check_whole_ties(
    trace: Trace, groups: Mapping[str, Group], tied: Mapping[str, tuple[str, int]], keep: Keep
) -> None:
    for group in trace.groups:
        if group.frozen is None and group.tied_count in tied and group.name not in groups:
            other, count = tied[str(group.tied_count)]
            if count != group.units:
                raise ConfigError(
                    f"Group '{group.name}' must keep as many units as '{other}' "
                    f"({group.tied_count} sizes both), and is not among those cut.\n  Give it {count} units too."
                )


def _masks(trace: Trace, keep: Keep) -> dict[Atom, Tensor]:
    masks: dict[Atom, Tensor] = {}
    for name, group in checked_groups(trace, keep).items():
        mask = torch.zeros(group.units, dtype=torch.bool)
        mask[list(keep[name])] = True
        masks[trace.atoms[name]] = mask
    return masks


def _counts(masks: Mapping[Atom, Tensor]) -> dict[Atom, int]:
    return {atom: int(mask.sum()) for atom, mask in masks.items()}


def _attributes(trace: Trace, masks: Mapping[Atom, Tensor]) -> dict[str, int | tuple[int, ...]]:
    solution = trace.solver.solve(_counts(masks))
    if solution.violated:
        places = ", ".join(dict.fromkeys(c.where for c in solution.violated))
        raise ConfigError(
            f"These groups cannot be cut together: the forward computes sizes that would no longer fit ({places}).\n"
            f"  Cut them one at a time, or keep the same number of units in each."
        )
    changed: dict[str, int | tuple[int, ...]] = {}
    for attribute, value in solution.attributes.items():
        if attribute.item is None:
            changed[attribute.path] = value
        else:
            items = list(changed.get(attribute.path, trace.sequences.get(attribute.path, (attribute.value,))))  # type: ignore[arg-type]
            items[attribute.item] = value
            changed[attribute.path] = tuple(items)
    return changed
