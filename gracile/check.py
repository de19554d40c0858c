"""What can be known to be wrong before a model is touched: the model, the data, the metric, the loss, the teacher."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data, logits_of
from gracile.errors import DataError, GracileError, ModelError
from gracile.evaluate.quality import collect


def check_request(model: Any, data: Any, teacher: Any = None) -> None:
    """Raise a GracileError if the model does not run on these data, or the metric does not judge it.

    The model runs on the first batch of each role in eval mode without gradients, and is as before afterwards.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Expected a PyTorch model (nn.Module), got {_described(model)}.\n"
            f"  Pass the model itself, not its class, its state_dict or a path."
        )
    if not any(p.numel() for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to compress.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"'{name}' is on the meta device and holds no values.\n  Load the weights first.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"'{name}' holds NaN or infinity: the model is damaged.")
    if not isinstance(data, Data):
        raise DataError(
            f"Expected gracile.Data, got {_described(data)}.\n  Pass gracile.Data(calibration=batches, ...)."
        )
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ModelError(f"The teacher is {_described(teacher)}; expected a PyTorch model (nn.Module).")
    if data.evaluation is not None and data.metric is None:
        raise DataError("Data(evaluation=...) without a metric.\n  Pass metric=gracile.metrics.accuracy, or another.")
    if data.metric is not None and data.evaluation is None:
        raise DataError("Data(metric=...) without evaluation data.\n  Pass evaluation=labelled_batches.")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for role in ("calibration", "train", "evaluation"):
                if getattr(data, role) is not None:
                    _check_role(model, data, role)
    finally:
        for module, training in modes:
            module.training = training


def _check_role(model: nn.Module, data: Data, role: str) -> None:
    batch = next(iter(getattr(data, role)), None)
    if batch is None:
        raise DataError(f"Data({role}=...) holds no batches.")
    _check_finite(batch, role)
    outputs = _run(model, data, batch, role)
    if not bool(torch.isfinite(logits_of(outputs)).all()):
        raise ModelError(
            f"The model answers NaN or infinity on the first {role} batch.\n  Check its weights and inputs."
        )
    if role == "evaluation" and data.metric is not None:
        collect(lambda _: outputs, [batch], data.metric)
    if role == "train" and data.loss is not None:
        try:
            loss = data.loss(outputs, batch)
        except GracileError:
            raise
        except Exception as error:
            raise DataError(
                f"Data(loss=...) fails on the first training batch: {_first_line(error)}\n"
                f"  It is called as loss(outputs, batch) and returns a scalar; is the batch labelled?"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise DataError(f"Data(loss=...) returned {_described(loss)}; expected a scalar tensor.")
        if not bool(torch.isfinite(loss)):
            raise DataError("Data(loss=...) is not finite on the first training batch.")


def _run(model: nn.Module, data: Data, batch: Batch, role: str) -> Any:
    try:
        return data.forward(model, batch)
    except GracileError:
        raise
    except Exception as error:
        arguments = ", ".join(inspect.signature(model.forward).parameters)
        shapes = [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        raise DataError(
            f"The model does not run on the first {role} batch: {_first_line(error)}\n"
            f"  {type(model).__name__}.forward takes ({arguments}); the batch is a {type(batch).__name__} with tensors "
            f"of shape {', '.join(map(str, shapes)) or 'none'}. Data(feed=...) can rearrange it."
        ) from error


def _check_finite(batch: Batch, role: str) -> None:
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise DataError(f"The first {role} batch holds NaN or infinity.\n  Clean the data first.")
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise DataError(f"The first {role} batch holds an empty tensor of shape {tuple(leaf.shape)}.")


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
