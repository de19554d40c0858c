"""The training loop of Distill and Finetune: zeros and grids are kept, the best epoch is returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context, derive_seed
from gracile.data import Batch, batch_size, device_of
from gracile.environment import has_bfloat16, instruction_set
from gracile.errors import DataError
from gracile.modes import channels_last
from gracile.nn import QuantizedLayer, begin_training, end_training, freeze_batch_norms, keep_sizes
from gracile.recipe import Recorder
from gracile.steps.optimizers import SGD, AdamW
from gracile.steps.training.epochs import Epochs
from gracile.steps.training.recentre import recentre_batch_norms
from gracile.steps.training.training_data import Split

#: Share of the schedule after which the batch norms of quantized layers keep their statistics, which weights that flip
#: between two codes disturb.
FROZEN = 0.8

#: (model, batch) -> scalar loss of a batch, differentiable.
Objective = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: cosine decay to zero over `epochs`, after a linear warm-up of 5 % of the steps.

    span: the part of this that is gone through, from its start at 0 to its end at 1.
    """

    epochs: int
    optimizer: SGD | AdamW
    mixed_precision: bool
    span: tuple[float, float] = (0.0, 1.0)

    def progress(self, done: float) -> float:
        """The share of the whole schedule that is done when this share of the epochs is."""
        start, end = self.span
        return start + (end - start) * done

    def rate(self, done: float) -> float:
        """The learning rate when this share of the epochs is done."""
        progress = self.progress(done)
        warm_up = 0.05
        factor = (
            progress / warm_up
            if progress < warm_up
            else (1 + math.cos(math.pi * (min(progress, 1.0) - warm_up) / (1 - warm_up))) / 2
        )
        return self.optimizer.learning_rate * max(factor, 1e-3)


def train(
    model: nn.Module, objective: Objective, split: Split, schedule: Schedule, context: Context, recorder: Recorder
) -> None:
    """Train in place and leave the model with the weights of the epoch that was best on the held-out part (`Epochs`).

    Weights that are exactly zero in a layer with zeros stay zero; quantized layers stay on grids whose scales are
    learned. The start counts as epoch 0: training that only harms is undone. With `context.directory`, every epoch is
    saved there, and a run that was interrupted goes on after the last one. Modes and `requires_grad` are restored, also
    after an error.
    """
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.enable_grad():
            _fit(model, objective, split, schedule, context, recorder)
    finally:
        end_training(model)
        for module, training in modes:
            module.training = training
        for name, p in model.named_parameters():
            p.requires_grad_(flags.get(name, True))
            p.grad = None


def _fit(
    model: nn.Module, objective: Objective, split: Split, schedule: Schedule, context: Context, recorder: Recorder
) -> None:
    zeros = _Zeros(model)
    if schedule.mixed_precision and device_of(model).type == "cpu" and not has_bfloat16():
        schedule = replace(schedule, mixed_precision=False)
        recorder.notes.append(f"Trained in float32: this processor ({instruction_set()}) only emulates bfloat16.")
    begin_training(model, context.original)
    zeros.follow(model)
    floating = [p for p in model.parameters() if p.is_floating_point()]
    trained = [p for p in floating if p.requires_grad] or floating  # a model frozen altogether is trained altogether
    for p in trained:
        p.requires_grad_(True)
    state = Epochs(model, schedule.optimizer.build(_groups(model, trained)), context.directory)
    state.resume()
    with channels_last(model, lambda net: objective(net, next(iter(split.train)))):
        _epochs(model, objective, split, schedule, context, state, zeros)
    best = state.restore_best()
    zeros.restore()
    _record(recorder, state.history, best)


def _epochs(
    model: nn.Module,
    objective: Objective,
    split: Split,
    schedule: Schedule,
    context: Context,
    state: Epochs,
    zeros: _Zeros,
) -> None:
    if not state.history:
        state.finish_epoch(_validate(model, objective, split.validation))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, "epoch", 0))
            recentre_batch_norms(model, lambda batch: objective(model, batch), split.train)
    steps = split.batches * schedule.epochs
    for epoch in range(len(state.history), schedule.epochs + 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, "epoch", epoch))
            model.train()
            done = split.batches * (epoch - 1)
            for i, batch in enumerate(split.train):
                if schedule.progress((done + i) / steps) >= FROZEN:
                    freeze_batch_norms(model)
                for group in state.optimizer.param_groups:
                    group["lr"] = schedule.rate((done + i) / steps)
                loss = _step(model, objective, batch, state.optimizer, schedule.mixed_precision)
                zeros.restore()
                keep_sizes(model)
                context.progress("train", done + i + 1, steps, f"epoch {epoch}/{schedule.epochs}, loss {loss:.4f}")
        state.finish_epoch(_validate(model, objective, split.validation))


def _groups(model: nn.Module, trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The trained parameters; those of learned grids are apart, for they must not decay to where they started."""
    grids = {id(p) for name, p in model.named_parameters() if name.endswith(("_scale_change", "_levels_change"))}
    weights = [p for p in trained if id(p) not in grids]
    learned = [p for p in trained if id(p) in grids]
    return [{"params": weights}] + ([{"params": learned, "weight_decay": 0.0}] if learned else [])


def _record(recorder: Recorder, history: list[float], best: int) -> None:
    recorder.numbers["best_epoch"] = best
    if math.isfinite(history[0]):
        recorder.numbers["held_out_loss_before"] = history[0]
        recorder.numbers["held_out_loss"] = history[best]
    if best == 0:
        recorder.notes.append("No epoch lowered the loss on the held-out training data: the weights are as before it.")


def _step(model: nn.Module, objective: Objective, batch: Batch, optimizer: torch.optim.Optimizer, mixed: bool) -> float:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=mixed):
        loss = objective(model, batch)
    if not loss.requires_grad:
        raise DataError(
            "The training loss has no gradient: it does not depend on the model's weights.\n"
            "  Data(loss=...) must be computed from the outputs, with torch functions and without detach()."
        )
    if not torch.isfinite(loss):
        raise DataError(
            "The training loss is not finite.\n  Lower the learning rate, or check the training data for NaN."
        )
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _validate(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> Tensor:
    """The objective on the held-out batches, [batches] float64, weighted so that their mean is that of all examples."""
    model.eval()
    losses, counts = [], []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random augmentation of held-out examples is the same for every epoch
        for batch in batches:
            losses.append(float(objective(model, batch)))
            counts.append(batch_size(batch))
    sizes = torch.tensor(counts, dtype=torch.float64)
    return torch.tensor(losses, dtype=torch.float64) * sizes / sizes.mean()


class _Zeros:
    """Weights that are exactly zero before training, put back to zero after every step.

    Of a quantized layer that was not pruned before it was rounded only rows of nothing but zeros: other zeros are codes
    like any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.masks: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            for key in dict(module.named_parameters(recurse=False)) | {"weight": None}:
                weight = getattr(module, key, None)
                if not isinstance(weight, Tensor) or weight.ndim < 2:
                    continue
                mask = (weight != 0).detach()
                if isinstance(module, QuantizedLayer) and not module.sparse:
                    mask = mask.flatten(1).any(1).view(-1, *[1] * (mask.ndim - 1)).expand_as(mask)
                if not mask.all():
                    self.masks[f"{name}.{key}" if name else key] = mask
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []

    def follow(self, model: nn.Module) -> None:
        """Take the parameters as they are now, quantized layers having float ones while they train."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.pairs = [(parameters[name], mask) for name, mask in self.masks.items() if name in parameters]

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, mask in self.pairs:
                parameter.mul_(mask)
