"""Models in eval mode or laid out otherwise for a while, and models that a forward must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode, and afterwards every module of them back in the mode it was in, also after an error."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def channels_last(model: nn.Module, run: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Lay the kernels of two-dimensional convolutions out channels-last, in which they compute faster; then as before.

    On CPUs only, where that holds whatever the precision. Values are the same; sums round in another order.
    run: a forward, tried first in both modes. A model that fails in it keeps its layout: one that takes a `view` of
    what a convolution gives counts on the usual order of values in memory.
    """
    kernels = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if parameter.ndim == 4 and parameter.device.type == "cpu" and parameter.is_contiguous()
    ]
    for parameter, data in kernels:
        parameter.data = data.contiguous(memory_format=torch.channels_last)
    try:
        if kernels and not _runs(model, run):
            _lay_out_as_before(kernels)
        yield
    finally:
        _lay_out_as_before(kernels)


def _runs(model: nn.Module, run: Callable[[nn.Module], Any]) -> bool:
    """Whether a forward succeeds in both modes; it leaves no trace in the model or in torch's random state."""
    try:
        with unchanged(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            run(model)
            run(model.train())
    except Exception:  # whatever the reason: training as before meets it again if it is another one
        return False
    return True


def _lay_out_as_before(kernels: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in kernels:
        same = torch.equal(parameter.data, data)
        parameter.data = data if same else parameter.data.contiguous()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode for as long as the context lasts; then modules hold what they held, whatever their forward did.

    Restored are the attributes, submodules, parameters and buffers that each module has, the contents of its buffers,
    and of lists, dictionaries and sets that it holds. In-place writes into parameters are not.
    """
    bindings = [(held, dict(held)) for module in model.modules() for held in _dictionaries(module)]
    containers = [
        (value, copy.copy(value))
        for module in model.modules()
        for value in module.__dict__.values()
        if type(value) in (list, dict, set)
    ]
    contents = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    model.eval()
    try:
        yield
    finally:
        for held, saved in bindings:
            held.clear()
            held.update(saved)
        for container, kept in containers:
            container.clear()
            container.extend(kept) if isinstance(container, list) else container.update(kept)  # type: ignore[union-attr]
        with torch.no_grad():
            for buffer, value in contents:
                if not torch.equal(buffer, value):  # batch norms write without counting a version up
                    buffer.copy_(value)


def _dictionaries(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__, module._parameters, module._buffers, module._modules]  # type: ignore[list-item]
