"""What can be known to be wrong before a model is touched: the model, the data, the metric, the loss, the teacher."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gracile.data import Batch, Data, call_model, does_not_run, first_line, logits_of
from gracile.errors import ConfigError, DataError, GracileError, ModelError
from gracile.evaluate.quality import aggregate, collect
from gracile.modes import eval_mode
from gracile.sharing import share_parameters


def check_request(model: Any, data: Any, teacher: Any = None) -> None:
    """Raise a GracileError if the model does not run on these data, or the metric does not judge it.

    The model runs on the first batch of each role in eval mode without gradients, and is as before afterwards.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Expected a PyTorch model (nn.Module), got {_described(model)}.\n"
            f"  Pass the model itself, not its class, its state_dict or a path."
        )
    _check_tensors(model)
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
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for role in ("calibration", "train", "evaluation"):
            if getattr(data, role) is not None:
                _check_role(model, data, role)


def copy_of(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy; raises ModelError where the model cannot be copied.

    share: the copy reads the model's parameters where they are (`share_parameters`); else it shares nothing.
    """
    try:
        return share_parameters(model) if share else copy.deepcopy(model)
    except Exception as error:  # a lock, a file, a tensor with a history: whatever the model holds
        raise ModelError(
            f"{type(model).__name__} cannot be copied, and compression works on a copy: {first_line(error)}\n"
            f"  A tensor that it keeps from a computation is to be detached, and weight norm removed."
        ) from error


def check_seed(seed: Any) -> None:
    """Raise ConfigError for a seed that is no whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed={seed!r}: expected a whole number.")


def _check_tensors(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"'{name}' has no shape yet, since its layer is lazy.\n  Run the model on a batch first.")
    if not any(p.numel() for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to compress.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"'{name}' is on the meta device and holds no values.\n  Load the weights first.")
        if tensor.is_floating_point() and _is_damaged(name, tensor):
            raise ModelError(f"'{name}' holds NaN or infinity: the model is damaged.\n  Go back to its checkpoint.")


def _is_damaged(name: str, tensor: Tensor) -> bool:
    """NaN anywhere; infinity in a parameter or a statistic, while a mask or a bound may well be infinite."""
    if not isinstance(tensor, nn.Parameter) and not name.endswith(("running_mean", "running_var")):
        return bool(torch.isnan(tensor).any())
    return not bool(torch.isfinite(tensor).all())


def _check_role(model: nn.Module, data: Data, role: str) -> None:
    try:
        batch = next(iter(getattr(data, role)), None)
    except GracileError:
        raise
    except Exception as error:
        raise DataError(
            f"Data({role}=...) cannot be read: {first_line(error)}\n  Mend what gives the batches."
        ) from error
    if batch is None:
        raise DataError(
            f"Data({role}=...) holds no batches.\n  Look at the dataset's size; a DataLoader with drop_last=True gives "
            f"none of a dataset smaller than a batch."
        )
    _check_finite(batch, role)
    outputs = _run(model, data, batch, role)
    if not bool(torch.isfinite(logits_of(outputs)).all()):
        raise ModelError(
            f"The model answers NaN or infinity on the first {role} batch.\n  Check its weights and inputs."
        )
    if role == "evaluation" and data.metric is not None:
        values = collect(lambda _: outputs, [batch], data.metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one batch may leave a metric undefined, and that is no mistake
            aggregate(data.metric, values)
    if role == "train" and data.loss is not None:
        try:
            loss = data.loss(outputs, batch)
        except GracileError:
            raise
        except Exception as error:
            raise DataError(
                f"Data(loss=...) fails on the first training batch: {first_line(error)}\n"
                f"  It is called as loss(outputs, batch) and returns a scalar; is the batch labelled?"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise DataError(f"Data(loss=...) returned {_described(loss)}; expected a scalar tensor.")
        if not bool(torch.isfinite(loss)):
            raise DataError("Data(loss=...) is not finite on the first training batch.")


def _run(model: nn.Module, data: Data, batch: Batch, role: str) -> Any:
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    try:
        outputs = call_model(model, batch, data.feed)
    except GracileError:
        raise
    except Exception as error:
        raise DataError(does_not_run(model, batch, error, f"the first {role} batch")) from error
    for name, parameter in model.named_parameters():
        if parameter._version != versions.get(name, parameter._version):
            raise ModelError(
                f"The forward of {type(model).__name__} writes into its parameter '{name}': every call changes "
                f"the model.\n  Hold what a forward changes in a buffer, or change it in training only."
            )
    return outputs


def _check_finite(batch: Batch, role: str) -> None:
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise DataError(f"The first {role} batch holds NaN or infinity.\n  Clean the data first.")
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise DataError(
                f"The first {role} batch holds an empty tensor of shape {tuple(leaf.shape)}.\n  Drop empty batches."
            )


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
