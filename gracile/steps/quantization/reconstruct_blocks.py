"""Blocks of quantized layers whose roundings are chosen together, for what each block gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Batch
from gracile.formats.granularity import from_rows, to_rows
from gracile.graph import Trace, find_blocks
from gracile.modes import eval_mode
from gracile.nn import QuantizedLayer
from gracile.ranges.base import Range
from gracile.recipe import Recorder
from gracile.report.model import LayerRow
from gracile.solvers import BlockSolver
from gracile.solvers.block_rounding import Choice
from gracile.stats.match import match_statistics, output_error, split_batches
from gracile.steps.pruning.sequence import called_once
from gracile.steps.quantization.block_calls import Call, Calls, main_output
from gracile.steps.quantization.finished_parts import FinishedParts
from gracile.steps.quantization.grids import grid_of

#: How often a solver that stays on the grid looks what all batches say.
LOOKS = 20


@dataclass
class Reconstruction:
    """How blocks came out.

    gains: block -> the error of its output on held-out batches as a share of what it was, of those that gained.
    before, after: the error of the model's outputs on held-out batches. blocks: how many were tried. kept: whether the
    blocks that gained are the model's.
    """

    gains: dict[str, float] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    blocks: int = 0
    kept: bool = False


def reconstruct_blocks(
    model: nn.Module,
    reference: nn.Module,
    traced: Trace,
    weights: Mapping[str, Tensor],
    solver: BlockSolver,
    ranges: Range,
    context: Context,
) -> Reconstruction:
    """Choose the roundings of quantized layers anew, block after block in the order of the forward; in place.

    Finished blocks are kept in the context's directory, and a step that was interrupted goes on behind them.

    traced: of the reference. weights: layer -> the float weight that its codes stand for. A block that is no better for
    it on held-out batches, and in the end the whole model, is put back.
    """
    fitted, held_out = split_batches(context.data)
    found = Reconstruction(before=output_error(model, reference, context.data, held_out))
    whole = {name: t.clone() for name, t in model.state_dict().items()}
    order = [name for name in called_once(reference, traced) if name in weights]
    blocks = _blocks(reference, order, fitted[0], context)
    found.blocks, finished = len(blocks), FinishedParts(context.directory, "reconstructed")
    with eval_mode(model, reference), torch.random.fork_rng(devices=[]):
        for done, (block, layers) in enumerate(blocks.items()):
            torch.manual_seed(context.generator("reconstruct", block).initial_seed())
            numbers = finished.restore(block, done, model, [block])
            if numbers is None:
                calls = Calls(model, reference, block, context)
                of_block = {name: weights[name] for name in layers}
                numbers = {"gain": _reconstruct(calls, of_block, fitted, held_out, solver, ranges)}
                finished.keep(block, done, model, [block], numbers)
            if numbers["gain"] < 1:
                found.gains[block] = numbers["gain"]
            context.progress("reconstruct", done + 1, len(blocks), block)
    match_statistics(model, reference, context.data, {})  # other codes have other means
    found.after = output_error(model, reference, context.data, held_out)
    found.kept = bool(found.gains) and found.after < found.before
    if not found.kept:
        model.load_state_dict(whole)
        found.gains.clear()
    return found


def _reconstruct(
    calls: Calls,
    weights: Mapping[str, Tensor],
    fitted: Sequence[Batch],
    held_out: Sequence[Batch],
    solver: BlockSolver,
    ranges: Range,
) -> float:
    """Choose one block's roundings; its error on held-out batches as a share of what it was, 1 where it is put back."""
    module = calls.model.get_submodule(calls.block)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    judged, given = calls.of(held_out), calls.of(fitted)
    if not judged or not given:
        return 1.0
    error = _error(module, judged)
    _choose(calls.model, calls.block, weights, given, solver, ranges)
    gained = _error(module, judged)
    if gained < error:
        return gained / error
    module.load_state_dict(before)
    return 1.0


def record_reconstruction(done: Reconstruction, title: str, model: nn.Module, recorder: Recorder) -> None:
    """A note and numbers of the whole, and a row for each block that gained."""
    recorder.numbers["output_error_before_reconstruction"] = done.before
    recorder.numbers["output_error_reconstructed"] = done.after
    recorder.notes.append(
        f"{title} {'reconstructed' if done.kept else 'was taken back on'} {done.blocks} blocks: output error on "
        f"held-out batches {done.after:.3g} with it, {done.before:.3g} before."
    )
    for block, gain in done.gains.items():
        kind = type(model.get_submodule(block)).__name__
        reason = f"{title}: {gain:.3g} of its output error before"
        recorder.layers.append(LayerRow(name=block, kind=kind, action="reconstructed", reason=reason))


def _blocks(reference: nn.Module, order: Sequence[str], batch: Batch, context: Context) -> dict[str, list[str]]:
    """Block -> its layers, in order: residual blocks that are called once; layers that lie in none are blocks."""
    residual = [
        block.name
        for block in find_blocks(reference, lambda net: context.data.forward(net, batch))
        if block.reason is None
    ]
    blocks: dict[str, list[str]] = {}
    for layer in order:
        inside = next((name for name in residual if layer.startswith(f"{name}.")), layer)
        blocks.setdefault(inside, []).append(layer)
    return blocks


def _error(block: nn.Module, calls: Sequence[Call]) -> float:
    total = 0.0
    with torch.no_grad():
        for call in calls:
            (args, kwargs), target = call.part(call.rows())  # copies, for a block may write into what it gets
            total += float((main_output(block(*args, **kwargs)) - target).double().square().sum())
    return total


def _choose(
    model: nn.Module,
    block: str,
    weights: Mapping[str, Tensor],
    calls: Sequence[Call],
    solver: BlockSolver,
    ranges: Range,
) -> None:
    """Set the layers' codes and the scales of their inputs to what serves the block best."""
    module = model.get_submodule(block)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in weights}
    choices = {name: _choice(layers[name], weight, solver, ranges) for name, weight in weights.items()}
    start = _error(module, calls) / sum(call.target.numel() for call in calls)
    if start == 0:
        return
    size = solver.batch_size if calls[0].divides(module) else None
    with _training(model, choices, solver.drop) as scales, torch.enable_grad():
        optimizer = solver.optimizer(list(choices.values()), scales)
        learned = [*(choice.variable for choice in choices.values()), *scales]
        best = _Best(module, calls, list(layers.values()), learned) if solver.on_grid else None
        for i in range(solver.iterations):
            progress = i / solver.iterations
            if best is not None and i % -(-solver.iterations // LOOKS) == 0:
                best.look()
            call = calls[int(torch.randint(len(calls), ()))]
            (args, kwargs), target = call.part(call.rows(size), solver.drop)
            loss = (main_output(module(*args, **kwargs)) - target).square().mean() / start
            optimizer.zero_grad()
            (loss + solver.pull(list(choices.values()), progress)).backward()
            solver.update(optimizer, progress)
        if best is not None:
            best.look()
            best.restore()


class _Best:
    """Of what is learned while weights stay on the grid, what served the block best on all batches."""

    def __init__(
        self, block: nn.Module, calls: Sequence[Call], layers: Sequence[Any], learned: Sequence[Tensor]
    ) -> None:
        self.block, self.calls, self.layers, self.learned = block, calls, layers, learned
        self.error, self.values = math.inf, [t.detach().clone() for t in learned]

    def look(self) -> None:
        """Keep what is there if it is better, with nothing dropped."""
        drops = [layer.drop for layer in self.layers]
        for layer in self.layers:
            layer.drop = 0.0
        error = _error(self.block, self.calls)
        for layer, drop in zip(self.layers, drops, strict=True):
            layer.drop = drop
        if error < self.error:
            self.error, self.values = error, [t.detach().clone() for t in self.learned]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        for tensor, value in zip(self.learned, self.values, strict=True):
            tensor.copy_(value)


@contextmanager
def _training(model: nn.Module, choices: Mapping[str, Choice], drop: float) -> Iterator[list[nn.Parameter]]:
    """The layers compute with weights between two grid points within the context, and with rounded ones after it.

    Gives the parameters of the scales of their inputs and outputs.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in choices}
    scales = []
    for name, layer in layers.items():
        layer.begin_training()
        layer.rounding, layer.drop = choices[name].weight, drop
        scales += [p for key, p in layer.named_parameters() if key in ("input_scale_change", "output_scale_change")]
    try:
        yield scales
    finally:
        for name, layer in layers.items():
            layer.rounding, layer.drop = None, 0.0
            layer.weight.data = choices[name].rounded().to(layer.weight)
            layer.end_training()


def _choice(layer: QuantizedLayer, weight: Tensor, solver: BlockSolver, ranges: Range) -> Choice:
    """The present grid point of every weight, and the next one on the weight's other side."""
    encoded = layer.encoded_weight()
    grid = grid_of(layer.weight_format, ranges, encoded)
    scale = grid.stored_scale(encoded).reshape(-1, 1)
    zero = encoded["zero_point"].reshape(-1, 1).float() if "zero_point" in encoded else torch.zeros_like(scale)
    here = layer.decoded_weight()
    wanted = weight.detach().to(here)
    rows = [to_rows(grid.granularity, t) for t in (wanted, here)]
    units = grid.units(rows[1], scale, zero)
    other = from_rows(grid.granularity, grid.second(rows[0], scale, zero, units) * scale, tuple(here.shape))
    return solver.choice(here, torch.where(wanted == 0, here, other), wanted)
