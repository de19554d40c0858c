"""The correction of batch-norm statistics and biases after a change, recorded."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from gracile.context import Context
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.stats.match import layers_of_few_bits, match_statistics


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model, without gradients held."""
    return copy.deepcopy(model)


def correct_statistics(
    model: nn.Module, reference: nn.Module, context: Context, recorder: Recorder, kept: Mapping[str, Tensor]
) -> float:
    """Match batch-norm statistics and biases to the reference on the calibration batches, and record the outcome.

    Then scales and means of layers of few bits, each of the two kept if the error of the outputs falls with it.
    Returns the error of the model's outputs on held-out batches, ‖y − y₀‖² / ‖y₀‖².
    """
    done = match_statistics(
        model, reference, context.data, kept, on_batch=lambda n: context.progress("correct statistics", n, None)
    )
    error, layers = min(done.error_after, done.error_before), done.layers
    recorder.numbers["output_error_before_correction"] = done.error_before
    if layers_of_few_bits(model, reference):
        scaled = match_statistics(model, reference, context.data, kept, gains=True)
        error = min(error, scaled.error_after)
        layers = tuple(dict.fromkeys((*layers, *scaled.layers)))
    recorder.numbers["output_error"] = error
    if layers:
        recorder.layers.extend(
            LayerRow(name=name, kind=type(model.get_submodule(name)).__name__, action="corrected") for name in layers
        )
        recorder.notes.append(
            f"Batch-norm and bias correction lowered the output error on held-out batches from {done.error_before:.3g} "
            f"to {error:.3g}."
        )
    elif done.error_before > 0:
        recorder.notes.append("Batch-norm and bias correction did not lower the output error and was taken back.")
    return error
