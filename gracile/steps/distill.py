"""Distill: train the compressed model to answer as its teacher does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Batch, logits_of
from gracile.errors import ConfigError, DataError
from gracile.losses import Hint, SoftLabels
from gracile.modes import channels_last, eval_mode
from gracile.nn import QuantizedLayer
from gracile.recipe import Recorder, Step
from gracile.report.model import LayerRow, StepRecord
from gracile.steps.optimizers import SGD, AdamW, default_optimizer
from gracile.steps.training.hidden_states import HiddenStates, comparable_layers, hint_loss
from gracile.steps.training.teacher import folded_teacher
from gracile.steps.training.train import Schedule, train
from gracile.steps.training.training_data import mix_examples, split_training


@dataclass(frozen=True)
class Distill(Step):
    """Minimise (1 − label_weight) · Σ losses(student, teacher) + label_weight · data.loss over the training data.

    losses: distillation losses (student, teacher) -> scalar, summed: SoftLabels(temperature), HardLabels(), ... of the
        outputs, and Hint(layers) of what layers give, the mean over these.
    epochs: passes over `data.train`. Kept is the best one on held-out training data, or the last if that is as good but
        for noise (`Epochs`).
    mixup: share of the training examples, in [0, 1], that are mixed with another of their batch (`mix_examples`), for
        student and teacher alike. For inputs of real numbers, and without labels. Helps where the teacher knows its
        training data by heart: between them its answers say more. Source: Beyer et al. 2022, arXiv:2106.05237.
    label_weight: share of the true labels' loss, in [0, 1); above 0 it needs `data.loss`.
    optimizer: SGD(...) or AdamW(...). None: AdamW(1e-3) with a Hint, which goes on from a good start, and where weights
        have fewer than 8 bits; else SGD for nets with two-dimensional batch norms and AdamW for others.
    held_out: share of the training data set aside to choose the epoch, the same in all trainings of a run.
    mixed_precision: run the forward passes in bfloat16 where torch deems it safe. On processors that only emulate it
        the training runs in float32 all the same, and the report says so.
    span: the part of the learning rate's schedule (warm-up, then cosine decay to zero) that these epochs go through;
        (0, 1) is all of it. `Gradual` trains in parts.

    The teacher is the original model unless the run was given another; it runs in eval mode on the same batch, so both
    see the same augmented views. Source: Hinton et al. 2015, arXiv:1503.02531.
    """

    _: KW_ONLY
    losses: tuple[Any, ...] = (SoftLabels(),)
    epochs: int = 1
    label_weight: float = 0.0
    mixup: float = 0.0
    optimizer: SGD | AdamW | None = None
    held_out: float = 0.05
    mixed_precision: bool = False
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.losses, tuple) or not self.losses or not all(callable(loss) for loss in self.losses):
            raise ConfigError(f"Distill(losses={self.losses!r}): expected a tuple of losses, e.g. (SoftLabels(),).")
        _check_training(self)
        if not 0 <= self.label_weight < 1:
            raise ConfigError(f"Distill(label_weight={self.label_weight!r}): expected a number in [0, 1).")
        if not 0 <= self.mixup <= 1:
            raise ConfigError(f"Distill(mixup={self.mixup!r}): expected a share of the examples, from 0 to 1.")
        if self.mixup > 0 and self.label_weight > 0:
            raise ConfigError("Distill: mixed examples have no label.\n  Give mixup or label_weight, not both.")

    @property
    def title(self) -> str:
        names = " + ".join(type(loss).__name__ for loss in self.losses)
        return f"Distill with {names} for {self.epochs} epoch{'s' if self.epochs != 1 else ''}"

    def check(self, model: nn.Module, context: Context) -> None:
        data = context.data
        if data.train is None:
            raise DataError(
                "Distill needs training data.\n  Pass Data(train=loader); labels are needed only with label_weight."
            )
        if self.label_weight > 0 and data.loss is None:
            raise DataError("Distill(label_weight=...) needs a loss.\n  Pass Data(loss=gracile.losses.cross_entropy).")
        batch = next(iter(data.train), None)
        if batch is None:
            raise DataError("The training data hold no batches.")
        if self.mixup > 0:
            with torch.random.fork_rng(devices=[]):
                mix_examples(batch)
        with torch.no_grad():
            student = _answers(model, batch, context)
            try:
                teacher = _answers(context.teacher, batch, context)
            except DataError as error:
                raise DataError(f"Distill: the teacher cannot take the training batches.\n  {error}") from error
        self._hidden_states(model, batch, context)
        if student.shape != teacher.shape:
            raise ConfigError(
                f"Distill: the model answers with shape {tuple(student.shape)} and the teacher with "
                f"{tuple(teacher.shape)} on the same batch.\n  A teacher must have the same classes."
            )

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self.check(model, context)
        recorder = Recorder(self)
        data = context.data
        assert data.train is not None
        split = split_training(data.train, self.held_out, context.run_generator("held out"))
        recorder.notes.append(split.note)

        batch = next(iter(data.train))
        hidden = self._hidden_states(model, batch, context)
        watched = {name for states in hidden.values() for name in states.layers}
        teacher = folded_teacher(context.teacher, lambda net: data.forward(net, batch), watched)
        for states in hidden.values():
            recorder.notes.append(f"Hidden states of {len(states.layers)} modules: {', '.join(states.layers)}.")

        def objective(net: nn.Module, batch: Batch) -> Tensor:
            if self.mixup > 0 and torch.is_grad_enabled():
                batch = mix_examples(batch, self.mixup)
            outputs = data.forward(net, batch)
            student = logits_of(outputs).float()
            with torch.no_grad():
                target = logits_of(data.forward(teacher, batch)).float()
            terms = [term(student, target) for term in self.losses if not isinstance(term, Hint)]
            terms += [hint_loss(hint, states) for hint, states in hidden.items()]
            loss = torch.stack(terms).sum()
            if self.label_weight > 0 and data.loss is not None:
                loss = (1 - self.label_weight) * loss + self.label_weight * data.loss(outputs, batch)
            return loss

        schedule = _schedule(self, model, AdamW(1e-3) if hidden else None)
        with ExitStack() as stack:
            for states in hidden.values():
                stack.enter_context(states.watched(model, teacher))
            stack.enter_context(eval_mode(teacher))
            stack.enter_context(channels_last(teacher, lambda net: data.forward(net, batch)))
            train(model, objective, split, schedule, context, recorder)
        recorder.layers += _rows(model, trained=recorder.numbers["best_epoch"] > 0)
        return recorder.record()

    def _hidden_states(self, model: nn.Module, batch: Batch, context: Context) -> dict[Hint, HiddenStates]:
        """What each hint compares."""

        def run(net: nn.Module) -> Any:
            return context.data.forward(net, batch)

        hints = [loss for loss in self.losses if isinstance(loss, Hint)]
        return {h: HiddenStates(comparable_layers(model, context.teacher, run, h.layers)) for h in hints}


@dataclass(frozen=True)
class Finetune(Step):
    """Minimise `data.loss` over the training data: the true labels alone.

    epochs, optimizer, held_out, mixed_precision, span: as in `Distill`.
    """

    _: KW_ONLY
    epochs: int = 1
    optimizer: SGD | AdamW | None = None
    held_out: float = 0.05
    mixed_precision: bool = False
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_training(self)

    @property
    def title(self) -> str:
        return f"Fine-tune for {self.epochs} epoch{'s' if self.epochs != 1 else ''}"

    def check(self, model: nn.Module, context: Context) -> None:
        if context.data.train is None or context.data.loss is None:
            raise DataError(
                "Finetune needs labelled training data and a loss.\n"
                "  Pass Data(train=loader, loss=gracile.losses.cross_entropy)."
            )

    def __call__(self, model: nn.Module, context: Context) -> StepRecord:
        self.check(model, context)
        recorder = Recorder(self)
        data = context.data
        assert data.train is not None and data.loss is not None
        loss = data.loss
        split = split_training(data.train, self.held_out, context.run_generator("held out"))
        recorder.notes.append(split.note)
        schedule = _schedule(self, model)
        train(model, lambda net, batch: loss(data.forward(net, batch), batch), split, schedule, context, recorder)
        recorder.layers += _rows(model, trained=recorder.numbers["best_epoch"] > 0)
        return recorder.record()


def _answers(model: nn.Module, batch: Batch, context: Context) -> Tensor:
    with eval_mode(model):
        return logits_of(context.data.forward(model, batch))


def _schedule(step: Distill | Finetune, model: nn.Module, default: SGD | AdamW | None = None) -> Schedule:
    optimizer = step.optimizer or default or default_optimizer(model)
    return Schedule(step.epochs, optimizer, step.mixed_precision, step.span)


def _rows(model: nn.Module, trained: bool) -> list[LayerRow]:
    """One for the model; if training changed it, one for each layer whose inputs have a grid, with its range now."""
    rows = [LayerRow(name="(all)", kind=type(model).__name__, action="trained")]
    for name, module in model.named_modules() if trained else ():
        if isinstance(module, QuantizedLayer) and (found := module.input_range) is not None:
            kind, zeros = type(module).__name__, module.sparsity
            rows.append(LayerRow(name=name, kind=kind, action="trained", range=found, sparsity=zeros))
    return rows


def _check_training(step: Distill | Finetune) -> None:
    name = type(step).__name__
    if step.optimizer is not None and not isinstance(step.optimizer, (SGD, AdamW)):
        raise ConfigError(
            f"{name}(optimizer={step.optimizer!r}): expected a setting, gracile.steps.SGD(learning_rate=0.02) or "
            f"AdamW(learning_rate=5e-4)."
        )
    if not isinstance(step.epochs, int) or isinstance(step.epochs, bool) or step.epochs < 1:
        raise ConfigError(f"{name}(epochs={step.epochs!r}): expected a whole number of at least 1.")
    if not 0 <= step.held_out < 1:
        raise ConfigError(f"{name}(held_out={step.held_out!r}): expected a number in [0, 1).")
    if not (isinstance(step.span, tuple) and len(step.span) == 2 and 0 <= step.span[0] < step.span[1] <= 1):
        raise ConfigError(f"{name}(span={step.span!r}): expected two numbers, 0 <= start < end <= 1.")
