"""Matrices of recurrent layers rounded by a solver, on the inputs and states that the rounded ones before them give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gracile.nn import EncodedWeight
from gracile.ranges.base import Range
from gracile.solvers import RoundingSolver
from gracile.stats.moments import CannotRefitError, Sums
from gracile.stats.sums import read_call
from gracile.stats.targets import ROWS
from gracile.stats.unroll import Steps, suffixes, unroll
from gracile.steps.quantization.grids import grid_of
from gracile.steps.quantization.solve_rounding import LayerRounding, Solved, rounding_of, solve_rounding

#: What feeds one batch to a model, by the batch's index.
Run = Callable[[int], Any]


@dataclass
class _Layer:
    """A recurrent layer and the arguments of its call on each batch."""

    module: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def steps(self, suffix: str) -> list[Steps]:
        return [unroll(self.module, args, kwargs, suffix) for args, kwargs in self.calls]


def round_recurrent(
    layer: nn.Module,
    original: nn.Module,
    run: Run,
    run_original: Run,
    batches: int,
    solver: RoundingSolver,
    ranges: Range,
) -> LayerRounding:
    """Give the matrices of a quantized LSTM, GRU or RNN the solver's codes, in place, in the order of the forward.

    W_ih is solved for what it gave in the original, on the inputs that it reads now; then W_hh, on the states along the
    sequence that the layer gives with it, for what it gave there and what W_ih still lacks, as both are added; but for
    the candidate's rows in a GRU, which a gate multiplies by itself. Biases take up what is left of the means.
    Projections of LSTMs stay rounded to nearest.

    layer, original: the same layer of the model and the original. run, run_original: feed these one of the batches.
    Raises CannotRefitError where the layer reads other steps than in the original.
    """
    now, then = (
        _Layer(module, [read_call(module, partial(feed, i))[:2] for i in range(batches)])
        for module, feed in ((layer, run), (original, run_original))
    )
    solved: list[Solved] = []
    for suffix in suffixes(now.module):
        solved += _round_suffix(now, then, suffix, solver, ranges)
    return rounding_of(solved)


def _round_suffix(now: _Layer, then: _Layer, suffix: str, solver: RoundingSolver, ranges: Range) -> list[Solved]:
    before = then.steps(suffix)
    weights = {part: getattr(then.module, f"weight_{part}_{suffix}").detach() for part in ("ih", "hh")}
    biases = {part: getattr(then.module, f"bias_{part}_{suffix}", None) for part in ("ih", "hh")}

    def solve(part: str, rows: list[Tensor], targets: list[Tensor]) -> Solved:
        sums = Sums()
        for x, t in zip(rows, targets, strict=True):
            kept = _some(len(x), ROWS // len(rows), x.device)
            sums.add(x[kept], t[kept])
        encoded: EncodedWeight = now.module.encoded[f"weight_{part}_{suffix}"]
        grid = grid_of(encoded.weight_format, ranges, encoded.encoded_weight())
        name, bias = f"weight_{part}_{suffix}", biases[part]
        prior = weights[part].double().cpu()
        solved = solve_rounding(name, prior, sums.moments(), bias is not None, solver, grid)
        encoded.set_weight(solved.encode(encoded.weight_shape))
        if bias is not None:
            shift = solved.shift(encoded.decoded_weight().double().cpu())
            with torch.no_grad():
                getattr(now.module, f"bias_{part}_{suffix}").copy_(bias.detach().double().cpu() + shift)
        return solved

    inputs = [steps.inputs for steps in now.steps(suffix)]
    if [len(x) for x in inputs] != [len(steps.inputs) for steps in before]:
        raise CannotRefitError(f"the steps of {suffix} are others than in the original")
    found = [solve("ih", inputs, [steps.inputs @ weights["ih"].T for steps in before])]
    present, added = now.steps(suffix), _added(then.module)
    rounded, targets = getattr(now.module, f"weight_ih_{suffix}"), []
    for steps, steps0 in zip(present, before, strict=True):
        lacking = steps0.inputs @ weights["ih"].T - steps.inputs @ rounded.T
        if biases["ih"] is not None:
            lacking += biases["ih"].detach() - getattr(now.module, f"bias_ih_{suffix}").detach()
        lacking[:, added:] = 0
        targets.append(steps0.states @ weights["hh"].T + lacking)
    return [*found, solve("hh", [steps.states for steps in present], targets)]


def _added(layer: Any) -> int:
    """Rows of a suffix's matrices whose products are added as they are: all gates but a GRU's last of three."""
    return int({"LSTM": 4, "GRU": 2}.get(layer.mode, 1) * layer.hidden_size)


def _some(count: int, wanted: int, device: torch.device) -> Tensor:
    """Indices of at most so many of `count` rows, spread evenly; the same for rows that belong together."""
    if count <= wanted:
        return torch.arange(count, device=device)
    return torch.linspace(0, count - 1, max(wanted, 1), device=device).long()
