"""The order in which residual blocks go: each time the one whose absence, after repair if there is one, costs least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import DataError
from gracile.graph import Block, Trace, trace
from gracile.patterns import Layers
from gracile.recipe import Recorder
from gracile.sharing import share_parameters
from gracile.stats.match import divergence, split_batches
from gracile.steps.pruning.absorb import absorbing_layers
from gracile.steps.pruning.blocks import put_module, put_skip, skip_blocks
from gracile.steps.pruning.repair import Reference, repair_units
from gracile.steps.pruning.tables import at_least, outputs_of, some_batches
from gracile.surgery import Resize

if TYPE_CHECKING:
    from gracile.steps.prune import Prune

#: Calibration examples that candidates are repaired on to be compared.
TRIAL_EXAMPLES = 512


class BlockOrder:
    """Blocks gone so far and what losing each of the others would do, measured anew after every one.

    gone: in the order taken. losses: of every block the last divergence measured with it left out, without repair.
    compared: for each block taken, the candidates' divergence after repair on held-out batches, by name.
    briefly: the context with fewer examples, for repairs that are compared and dropped.
    least: of what `next` gave last, its divergence. strayed: whether a repair ever led to another block than the one
    that costs least without. trial: a copy of the model without the blocks that are gone.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batch: Batch,
        step: Prune,
        context: Context,
        *,
        repaired: bool = True,
    ) -> None:
        """repaired: whether candidates are compared after the step's repair, where it has one."""
        self.model, self.blocks, self.batch, self.step, self.context = model, list(blocks), batch, step, context
        self.pattern = next(pattern for pattern in step.patterns if isinstance(pattern, Layers))
        self.repaired = repaired and step.repair is not None and self.pattern.candidates > 1
        some = at_least(list(context.data.calibration_batches), TRIAL_EXAMPLES)
        self.briefly = replace(context, data=replace(context.data, calibration=some))
        self.trial = share_parameters(model).eval()
        self.batches = some_batches(context.data, self.pattern.examples)
        self.references = outputs_of(self.trial, context.data, self.batches)
        self.held_out = split_batches(context.data)[1]
        self.expected = outputs_of(self.trial, context.data, self.held_out)
        self.gone: list[Block] = []
        self.losses: dict[Block, float] = {}
        self.compared: list[dict[str, float]] = []
        self.least = math.inf
        self.strayed = False
        self._measure()

    @property
    def left(self) -> list[Block]:
        """Blocks that are still there, in the order of the model."""
        return [block for block in self.blocks if block not in self.gone]

    def next(self) -> tuple[Block, float]:
        """The block to leave out next, and the divergence that this makes, after repair if there is one."""
        ranked = sorted(self.left, key=self.losses.__getitem__)
        if not self.repaired:
            return ranked[0], self.losses[ranked[0]]
        found = {block: self.loss_repaired([*self.gone, block]) for block in ranked[: self.pattern.candidates]}
        self.compared.append({block.name: loss for block, loss in found.items()})
        best = min(found, key=found.__getitem__)
        self.strayed = self.strayed or best is not ranked[0]
        return best, found[best]

    def take(self, block: Block) -> None:
        """Leave the block out of the trial and measure the others anew."""
        self.gone.append(block)
        put_skip(self.trial, block)
        self._measure()

    def loss_repaired(self, gone: Sequence[Block]) -> float:
        """The divergence on held-out batches of a copy without these blocks, the rest repaired; infinity for NaN."""
        trial = share_parameters(self.model).eval()
        skip_blocks(trial, gone)
        refit = replace(self.step, correct=False)  # whose intercepts have corrected what there is to correct
        repair_blocks(trial, self.model, gone, self.batch, refit, self.briefly, Recorder(refit))
        loss = divergence(outputs_of(trial, self.context.data, self.held_out), self.expected)
        return loss if math.isfinite(loss) else math.inf

    def _measure(self) -> None:
        for done, block in enumerate(self.left):
            module = put_skip(self.trial, block)
            loss = divergence(outputs_of(self.trial, self.context.data, self.batches), self.references)
            put_module(self.trial, block.name, module)
            if not math.isfinite(loss):
                raise DataError(f"The outputs are NaN or infinite without '{block.name}'.\n  Exclude it.")
            self.losses[block] = loss
            self.context.progress("blocks", done + 1, len(self.left), block.name)
        if self.left:
            self.least = min(self.losses[block] for block in self.left)


def repair_blocks(
    model: nn.Module,
    reference: nn.Module,
    gone: Sequence[Block],
    batch: Batch,
    step: Prune,
    context: Context,
    recorder: Recorder,
) -> Reference:
    """Refit and correct a model without some blocks, towards the one with them.

    Layers behind the first of them, and before that the layers that can take up what blocks added (`absorbing_layers`).
    Returns these layers with the reference, for a cut of units that follows.
    """
    traced, towards = _after_removal(model, reference, gone, batch, context)
    repair_units(model, towards, traced, Resize({}), step, context, recorder)
    return towards


def _after_removal(
    model: nn.Module, reference: nn.Module, gone: Sequence[Block], batch: Batch, context: Context
) -> tuple[Trace, Reference]:
    """A trace of the model without the blocks, and the reference with the layers behind and before them.

    The first behind them is one that is called once; None where there is none.
    """

    def run(net: nn.Module) -> Any:
        return context.data.forward(net, batch)

    traced = trace(model, run)
    order = [layer.name for layer in trace(reference, run).layers]
    left = {layer.name for layer in traced.layers if layer.calls == 1}
    inside = [i for i, name in enumerate(order) if any(name.startswith(f"{block.name}.") for block in gone)]
    first = next((name for name in order[inside[0] :] if name in left), None)
    return traced, Reference(reference, first, absorbing_layers(reference, traced, order, gone, run))
