"""What makes good a cut without training: weights refitted, then batch-norm statistics and biases corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.graph import Trace
from gracile.modes import eval_mode
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.sharing import own_parameters
from gracile.solvers import LeastSquares
from gracile.stats.fit_outputs import fit_last_factors
from gracile.stats.match import output_error, split_batches
from gracile.stats.norms import has_factors
from gracile.stats.refit import Refit, refit, refittable
from gracile.steps.correct import correct_statistics
from gracile.steps.pruning.sequence import called_once, targets_of
from gracile.surgery import Resize

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


@dataclass(frozen=True)
class Reference:
    """What a cut model is repaired towards, and what it lacks of that before any units are cut.

    model: has all layers of the cut one, of the shapes before the cut. first: the layer behind blocks that were
    removed, whose inputs differ without any cut. absorbed: layers before it -> the blocks whose change of the stream
    they take up (`Targets`).
    """

    model: nn.Module
    first: str | None = None
    absorbed: Mapping[str, Sequence[str]] = field(default_factory=dict)


def repair_units(
    model: nn.Module,
    reference: Reference,
    traced: Trace,
    edit: Resize,
    step: Prune,
    context: Context,
    recorder: Recorder,
) -> None:
    """Refit (if the step has a repair) and correct (if it says so) the cut model towards the reference.

    The refit is kept if the output error on held-out calibration batches is lower with it than without. Layers are
    refitted from the reference's `first` or from the first that lost inputs on, whichever comes first.
    """
    kept = kept_outputs(edit)
    if step.repair is None and not step.correct:
        return
    own_parameters(model, reference.model)
    if step.repair is None:
        correct_statistics(model, reference.model, context, recorder, kept)
        return
    cut, plain_recorder = _vectors(model), Recorder(step)
    without = _settle(model, reference.model, step, context, plain_recorder, kept)
    plain = _vectors(model)
    _put(model, cut)
    layers, skipped = _refit(model, reference, traced, edit, step.repair, context)
    refitted_recorder = Recorder(step)
    error = _settle(model, reference.model, step, context, refitted_recorder, kept)
    accepted = error < without
    if not accepted:
        _undo_refit(model, reference.model, edit, layers)
        _put(model, plain)
    chosen = refitted_recorder if accepted else plain_recorder
    if accepted:
        recorder.layers.extend(
            LayerRow(name=n, kind=type(model.get_submodule(n)).__name__, action="refitted") for n in layers
        )
        for name, reason in skipped.items():
            recorder.skip(name, type(model.get_submodule(name)).__name__, f"not refitted: {reason}")
    recorder.layers.extend(chosen.layers)
    recorder.notes.extend(chosen.notes)
    recorder.numbers.update(chosen.numbers)
    recorder.numbers["output_error_without_refit"] = without
    recorder.notes.append(
        f"The least-squares refit of {len(layers)} layers {'was kept' if accepted else 'was taken back'}: "
        f"output error on held-out batches {error:.3g} with it, {without:.3g} without."
    )
    last = layers[-1] if layers else None
    if accepted and last is not None and has_factors(model.get_submodule(last)):
        _fit_last(model, reference.model, last, context, recorder)


def _fit_last(model: nn.Module, original: nn.Module, name: str, context: Context, recorder: Recorder) -> None:
    """Fit the factors of the normalisation behind which no layer can be refitted (a tied head) to the outputs."""
    found = fit_last_factors(model, original, name, context.data)
    if found is not None:
        before, after = found
        recorder.notes.append(
            f"The factors of {name} were fitted to the outputs: divergence on held-out batches {before:.3g} before it, "
            f"{after:.3g} behind."
        )


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the biases and statistics: all that a correction changes, and of a refit all but the weights."""
    return {name: t.detach().clone() for name, t in _tensors(model).items() if t.ndim < 2}


@torch.no_grad()
def _put(model: nn.Module, vectors: Mapping[str, Tensor]) -> None:
    tensors = _tensors(model)
    for name, value in vectors.items():
        tensors[name].copy_(value)


@torch.no_grad()
def _undo_refit(model: nn.Module, reference: nn.Module, edit: Resize, layers: list[str]) -> None:
    """Give refitted layers the weights that the cut left them: cut from the reference's again, one by one."""
    for name in layers:
        whole: Any = reference.get_submodule(name).weight
        names = [n for n, p in reference.named_parameters(remove_duplicate=False) if p is whole]  # several if tied
        weight = whole
        for axis in range(whole.ndim):
            indices = next((edit.keep[f"{n}:{axis}"] for n in names if f"{n}:{axis}" in edit.keep), None)
            if indices is not None:
                weight = weight.index_select(axis, torch.tensor(indices, device=weight.device))
        cut: Any = model.get_submodule(name).weight
        cut.copy_(weight)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _settle(
    model: nn.Module,
    reference: nn.Module,
    step: Prune,
    context: Context,
    recorder: Recorder,
    kept: Mapping[str, Tensor],
) -> float:
    """Correct statistics if the step says so; returns the output error on held-out batches either way."""
    if step.correct:
        return correct_statistics(model, reference, context, recorder, kept)
    return output_error(model, reference, context.data, split_batches(context.data)[1])


def _refit(
    model: nn.Module, reference: Reference, traced: Trace, edit: Resize, solver: LeastSquares, context: Context
) -> tuple[list[str], dict[str, str]]:
    """Refit every layer that can be, from the earlier of `first` and the first that lost inputs on.

    Returns their names, and why others were not.
    """
    order, source = called_once(model, traced), reference.model
    starts = [name for name in order if name == reference.first or f"{name}.weight:1" in edit.keep]
    if not starts:
        return [], {}
    start = order.index(starts[0])
    later = [name for i, name in enumerate(order) if i >= start or name in reference.absorbed]
    # A norm whose output layers read that are refitted to it anyway gains nothing, and sums with it lose.
    kinds = {name: refittable if name != order[-1] else _refittable_last for name in later}
    layers = [n for n, able in kinds.items() if able(model.get_submodule(n)) and able(source.get_submodule(n))]
    rows = {n: torch.tensor(edit.keep[f"{n}.weight:0"]) for n in layers if f"{n}.weight:0" in edit.keep}
    targets = targets_of(source, traced, layers, context, absorbed=reference.absorbed)
    repair = Refit(model, targets, solver, kept=rows, norms=dict(traced.batch_norm_pairs()))
    with eval_mode(model, source):
        skipped = refit(repair, layers, on_layer=lambda n: context.progress("refit", n, len(layers)))
    return [name for name in layers if name not in skipped], skipped


def _refittable_last(module: nn.Module) -> bool:
    return refittable(module) or has_factors(module)


def kept_outputs(edit: Resize) -> dict[str, Tensor]:
    """Layer name -> the output channels of the uncut layer that the cut one still has."""
    kept = {}
    for key, indices in edit.keep.items():
        name, _, axis = key.rpartition(":")
        layer, _, tensor = name.rpartition(".")
        if tensor in ("bias", "running_mean") and axis == "0":
            kept[layer] = torch.tensor(indices)
    return kept
