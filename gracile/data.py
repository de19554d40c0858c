"""Data: what calibrates, trains and judges a model, and how a batch of it is fed to the model."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import DataError, GracileError

#: A tensor, a tuple or list (inputs..., target), or a dict of named tensors.
Batch = Any
#: Positional and keyword arguments of one call of the model.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

LABEL_KEYS = ("labels", "label", "target", "targets")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a model is calibrated, trained and judged on.

    calibration: iterable of batches; labels are not needed and not used. None: the batches of `train`, labels unused.
    train: iterable of labelled batches; allows Distill, Finetune and criteria that need gradients.
    evaluation: iterable of labelled batches on which quality is measured, never used for fitting.
    metric: (outputs, batch) -> per-example scores [n] or [n, k], higher is better. A metric may carry
        `aggregate(values) -> float`; without it the mean is taken.
    loss: (outputs, batch) -> scalar.
    feed: batch -> arguments for the model (a tuple, or a dict of keyword arguments). None: see `inputs_of`.

    Every iterable must be re-iterable (a list, a DataLoader): a generator is refused, since a second pass over it would
    silently see nothing.
    """

    calibration: Iterable[Batch] | None = None
    train: Iterable[Batch] | None = None
    evaluation: Iterable[Batch] | None = None
    metric: Callable[[Any, Batch], Any] | None = None
    loss: Callable[[Any, Batch], Tensor] | None = None
    feed: Callable[[Batch], Any] | None = None

    def __post_init__(self) -> None:
        for role in ("calibration", "train", "evaluation"):
            batches = getattr(self, role)
            if batches is None:
                continue
            if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
                raise DataError(
                    f"Data({role}=...): expected an iterable of batches, got {type(batches).__name__}.\n"
                    f"  Pass a list of batches or a DataLoader; one batch alone is [batch]."
                )
            if isinstance(batches, Iterator):
                raise DataError(
                    f"Data({role}=...): got a one-shot iterator ({type(batches).__name__}), and it is read more than "
                    f"once.\n  Pass list(...) of it, or a DataLoader."
                )
        for role in ("metric", "loss", "feed"):
            value = getattr(self, role)
            if value is not None and not callable(value):
                raise DataError(f"Data({role}=...): expected a callable, got {type(value).__name__}.")

    @property
    def has_calibration(self) -> bool:
        """Whether there are batches to calibrate on."""
        return self.calibration is not None or self.train is not None

    @property
    def calibration_batches(self) -> Iterable[Batch]:
        """The batches to calibrate on: `calibration`, or else `train`."""
        batches = self.calibration if self.calibration is not None else self.train
        if batches is None:
            raise DataError("No calibration data.\n  Pass Data(calibration=batches) or Data(train=loader).")
        return batches

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Outputs of the model on one batch, moved to the model's device; DataError where it does not run on it."""
        try:
            return call_model(model, batch, self.feed)
        except GracileError:
            raise
        except Exception as error:  # whatever the user's model or feed raises
            raise DataError(does_not_run(model, batch, error, "a batch")) from error


def inputs_of(model: nn.Module, batch: Batch, feed: Callable[[Batch], Any] | None = None) -> Inputs:
    """Arguments with which a batch is fed to the model, on the model's device.

    With `feed`, what it returns: a dict is keyword arguments, a tuple positional ones, anything else the one argument.
    Without: a tensor is the one argument; of a tuple or list of two or more, the last is the target and stays out,
    unless `forward` requires as many arguments as there are items; a dict gives those of its items that `forward`
    accepts, without labels.
    """
    device = device_of(model)
    if feed is not None:
        fed = feed(batch)
        if isinstance(fed, Mapping):
            return (), {k: _to(v, device) for k, v in fed.items()}
        args = fed if isinstance(fed, (tuple, list)) else (fed,)
        return tuple(_to(a, device) for a in args), {}
    if isinstance(batch, Mapping):
        names, accepts_any = _parameters(model)
        kwargs = {k: _to(v, device) for k, v in batch.items() if k not in LABEL_KEYS and (accepts_any or k in names)}
        if not kwargs:
            raise DataError(
                f"A batch with the keys {sorted(map(str, batch))} has none that {type(model).__name__}.forward accepts "
                f"({', '.join(names) or 'nothing'}).\n  Rename the keys or pass Data(feed=...)."
            )
        return (), kwargs
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError("A batch is an empty tuple.\n  A batch is a tensor, a tuple (inputs..., target) or a dict.")
        count = len(batch)
        if count > 1 and _required(model) < count:
            count -= 1
        return tuple(_to(item, device) for item in batch[:count]), {}
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    raise DataError(
        f"A batch is a {type(batch).__name__}; expected a tensor, a tuple (inputs..., target) or a dict.\n"
        f"  Convert it (torch.as_tensor) or pass Data(feed=...)."
    )


def call_model(model: nn.Module, batch: Batch, feed: Callable[[Batch], Any] | None = None) -> Any:
    """Outputs of the model on one batch, in the mode (train or eval) that the model is in."""
    args, kwargs = inputs_of(model, batch, feed)
    return model(*args, **kwargs)


def does_not_run(model: nn.Module, batch: Batch, error: BaseException, which: str) -> str:
    """A message for an error that a model raised on a batch; `which` says which batch, "the first train batch"."""
    arguments = ", ".join(inspect.signature(model.forward).parameters)
    shapes = [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(_plain(batch)) if isinstance(t, Tensor)]
    return (
        f"The model does not run on {which}: {first_line(error)}\n"
        f"  {type(model).__name__}.forward takes ({arguments}); the batch is a {type(batch).__name__} with tensors "
        f"of shape {', '.join(map(str, shapes)) or 'none'}. Data(feed=...) can rearrange it."
    )


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a message that quotes it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'without a message'}"


def labels_of(batch: Batch) -> Tensor:
    """The target of a labelled batch: the last item of a tuple, or a dict's 'labels' (or label, target, targets)."""
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return torch.as_tensor(batch[key])
        raise DataError(f"A batch with the keys {sorted(map(str, batch))} has no labels.\n  Add them under 'labels'.")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return torch.as_tensor(batch[-1])
    raise DataError(
        f"A {type(batch).__name__} batch has no labels, and they are needed here.\n  Use tuples (inputs..., target)."
    )


def batch_size(batch: Batch) -> int:
    """Number of examples in a batch: the first dimension of its first tensor."""
    for leaf in torch.utils._pytree.tree_leaves(_plain(batch)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise DataError(f"A {type(batch).__name__} batch holds no tensor with a batch dimension.")


def map_examples(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor that has an entry for each example, on its first axis, changed; the rest as it is."""
    size = batch_size(batch)

    def apply(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size else leaf

    return torch.utils._pytree.tree_map(apply, _plain(batch))


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Examples start..stop of a batch: every tensor whose first dimension is the batch's is sliced."""
    return map_examples(batch, lambda tensor: tensor[start:stop])


def logits_of(outputs: Any) -> Tensor:
    """The main tensor of a model's outputs: itself, `.logits`, or the first of a tuple or dict."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "last_hidden_state"):
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    for leaf in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            return leaf
    raise DataError(f"The model returned {type(outputs).__name__}, which holds no tensor.")


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU for a model with neither."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _plain(batch: Batch) -> Batch:
    """A mapping of another class, such as a tokenizer's, as a dict, which torch looks into."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _parameters(model: nn.Module) -> tuple[list[str], bool]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _required(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(1 for p in parameters if p.kind in kinds and p.default is p.empty)
