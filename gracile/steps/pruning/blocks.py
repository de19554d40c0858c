"""Residual blocks of a model: which may be left out, and how they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.data import Batch
from gracile.errors import ConfigError
from gracile.graph import Block, find_blocks
from gracile.nn import build_layer
from gracile.recipe import Recorder
from gracile.select import Select
from gracile.sharing import share_parameters
from gracile.stats.sums import stream_of
from gracile.steps.pruning.tables import outputs_of
from gracile.surgery import Edit, Remove, Swap, apply

if TYPE_CHECKING:
    from gracile.steps.prune import Prune


def select_blocks(model: nn.Module, batch: Batch, step: Prune, context: Context, recorder: Recorder) -> list[Block]:
    """Residual blocks that may be left out; what is not is recorded with its reason."""
    excluded = Select(exclude=step.exclude)
    excluded.check([name for name, _ in model.named_modules() if name])
    select = (context.select or Select()).without(*step.exclude)
    chosen = []
    for block in find_blocks(model, lambda net: context.data.forward(net, batch)):
        inside = [f"{block.name}.{name}" for name, _ in model.get_submodule(block.name).named_modules() if name]
        outside = [name for name in inside if not Select(exclude=select.exclude).matches(name)]
        if not (Select(include=select.include).matches(block.name)):
            continue
        reason = block.reason
        if not select.matches(block.name):
            reason = "excluded"
        elif outside:
            reason = f"it holds '{outside[0]}', which is excluded"
        reason = reason or _cannot_skip(model, block, batch, context)
        if reason is None:
            chosen.append(block)
        else:
            recorder.skip(block.name, block.kind, reason)
    if not chosen:
        reasons = "\n  ".join(f"{row.name}: {row.reason}" for row in recorder.layers[:5])
        raise ConfigError(
            "Prune: nothing that Layers() can remove.\n  "
            + (reasons or "No selected module adds to its input: the model has no residual blocks of one shape.")
        )
    return chosen


def skip_blocks(model: nn.Module, gone: Sequence[Block]) -> None:
    """Put a `Skip` in the place of each block; all names stay, so that layers can be compared with their originals."""
    apply(model, [_skip(block) for block in gone])


def put_skip(model: nn.Module, block: Block) -> nn.Module:
    """Put a `Skip` in the block's place, and give back what was there."""
    module = model.get_submodule(block.name)
    put_module(model, block.name, build_layer("Skip", {"outputs": block.outputs}, module))
    return module


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._modules[key] = module


def removal_edits(model: nn.Module, gone: Sequence[Block], batch: Batch, context: Context) -> list[Edit]:
    """Edits without these blocks: out of their list or sequence where the model then computes the same, else skipped.

    The last block comes first, so that the names of those before it still hold when it is gone.
    """
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(gone, key=lambda block: -place[block.name])
    trial = share_parameters(model).eval()
    skip_blocks(trial, gone)
    expected = outputs_of(trial, context.data, [batch])
    edits: list[Edit] = []
    for block in ordered:
        candidate = share_parameters(trial)
        try:
            apply(candidate, [Remove(block.name)])
            same = _same(outputs_of(candidate, context.data, [batch]), expected)
        except Exception:  # no list or sequence, or a forward that counts on its length
            same = False
        if same:
            trial = candidate
        edits.append(Remove(block.name) if same else _skip(block))
    return edits


def _cannot_skip(model: nn.Module, block: Block, batch: Batch, context: Context) -> str | None:
    """Why leaving the block out is not the same as replacing its first result by its input; None where it is."""

    def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x, _ = stream_of(args, kwargs, output)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    trial = share_parameters(model).eval()
    handle = trial.get_submodule(block.name).register_forward_hook(replace, with_kwargs=True)
    expected = outputs_of(trial, context.data, [batch])
    handle.remove()
    put_skip(trial, block)
    try:
        found = outputs_of(trial, context.data, [batch])
    except Exception as error:
        return f"the model does not run without it: {error}".splitlines()[0]
    return None if _same(found, expected) else "the model needs more of it than its first result"


def _skip(block: Block) -> Swap:
    return Swap(block.name, "Skip", {"outputs": block.outputs})


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected))
