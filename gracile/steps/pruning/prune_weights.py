"""Weights set to zero: unstructured by fraction or threshold, and N:M."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gracile.allocate import MeasuredLoss, Uniform
from gracile.context import Context
from gracile.errors import ConfigError, NothingChangedError
from gracile.patterns import NM
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.select import Select
from gracile.stats.rows import unfoldable
from gracile.steps.correct import copy_model, correct_statistics
from gracile.steps.pruning.scores import score_weights

if TYPE_CHECKING:
    from gracile.steps.prune import Prune

PRUNABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
)


def prunable_weights(model: nn.Module) -> dict[str, str]:
    """Weight matrices that may be pruned, by parameter name, and the kind of layer each belongs to.

    Vectors (biases, norms) are left out. A tied weight appears once, under its first name.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, PRUNABLE):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = type(module).__name__
    return found


def prune_weights(model: nn.Module, step: Prune, context: Context, recorder: Recorder) -> None:
    """Set the lowest-scored weights of the selected layers to exactly zero."""
    select = (context.select or Select()).without(*step.exclude)
    everything = prunable_weights(model)
    if not everything:
        raise ConfigError(f"Prune: {type(model).__name__} has no layer with weights that can be pruned.")
    Select(exclude=step.exclude).check([name.rpartition(".")[0] for name in everything])
    weights = [name for name in everything if select.matches(name.rpartition(".")[0])]
    if "gram" in step.criterion.needs:
        for name in [n for n in weights if not unfoldable(model.get_submodule(n.rpartition(".")[0]))]:
            recorder.skip(name.removesuffix(".weight"), everything[name], "its inputs do not unfold into rows")
            weights.remove(name)
    if not weights:
        raise ConfigError("Prune: the selection leaves no layer with weights that can be pruned.")
    scores = dict(score_weights(model, weights, step.criterion, context, step.examples))
    masks = _masks(step, scores, everything, recorder)
    reference = copy_model(model) if step.correct and context.data.has_calibration else None
    removed = 0
    with torch.no_grad():
        for name, keep in masks.items():
            weight = model.get_parameter(name)
            already = int((weight == 0).sum())
            weight.masked_fill_(~keep, 0.0)
            zeros = int((weight == 0).sum())
            removed += zeros - already
            recorder.layers.append(
                LayerRow(
                    name=name.removesuffix(".weight"),
                    kind=everything[name],
                    action="pruned",
                    sparsity=zeros / weight.numel(),
                )
            )
    if removed == 0:
        raise NothingChangedError(
            f"Prune: no weight was removed from {len(weights)} layers{_nearest(step, scores)}.\n"
            f"  Raise the amount, or check that the model is not pruned already."
        )
    total = sum(model.get_parameter(n).numel() for n in weights)
    recorder.numbers["sparsity"] = sum(int((model.get_parameter(n) == 0).sum()) for n in weights) / total
    if reference is not None:
        correct_statistics(model, reference, context, recorder, {})


def _masks(step: Prune, scores: dict[str, Tensor], kinds: dict[str, str], recorder: Recorder) -> dict[str, Tensor]:
    if isinstance(step.pattern, NM):
        masks = {}
        for name, score in scores.items():
            columns = score[0].numel()
            if columns % step.pattern.of:
                reason = f"{columns} columns are no multiple of {step.pattern.of}"
                recorder.skip(name.removesuffix(".weight"), kinds[name], reason)
                continue
            masks[name] = step.pattern.mask(score)
        return masks
    if step.below is not None:
        return {name: score >= step.below for name, score in scores.items()}
    assert step.fraction is not None
    allocation = step.allocation or Uniform()
    assert not isinstance(allocation, MeasuredLoss)  # refused by Prune: single weights have no widths
    removed = allocation({name: score.flatten() for name, score in scores.items()}, step.fraction)
    return {name: step.pattern.mask(score, removed[name] / score.numel()) for name, score in scores.items()}


def _nearest(step: Prune, scores: dict[str, Tensor]) -> str:
    if step.below is None:
        return ""
    return f": the lowest score is {min(float(s.min()) for s in scores.values()):.3g}, not below {step.below:g}"
