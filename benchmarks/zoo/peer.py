"""Torch-Pruning on one model of the zoo, given what its README and examples tell a user to give it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import Batch
from benchmarks.zoo.one import FRACTION, call, count, first_line
from gracile.graph.values import tensors_in

#: Projections into heads, by the names that attention modules give them.
QUERIES = ("query", "q_proj", "q", "q_lin", "to_q", "wq", "qkv", "in_proj", "Wqkv", "query_key_value")
KEYS_VALUES = ("key", "value", "k_proj", "v_proj", "k", "v", "k_lin", "v_lin", "to_k", "to_v", "wk", "wv")
COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
HEAD_SIZES = ("head_dim", "attention_head_size")


def torch_pruning(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Its base pruner with its defaults at the same ratio: the model must run after it, with outputs of equal shapes.

    It is given the layers that make the model's outputs as `ignored_layers`, and the number of heads of each attention
    projection as `num_heads`; afterwards the attention modules' sizes are set as its examples set them.
    """
    import torch_pruning as tp

    net = copy.deepcopy(model)
    row: dict[str, Any] = {"outcome": "failed"}
    try:
        kinds = tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_EMBED, tp.ops.TORCH_LSTM, tp.ops.TORCH_MHA
        before, ignored = last_layers(net, batch, kinds)
        heads = attention_heads(net)
        row |= {"ignored_layers": len(ignored), "num_heads": len(heads)}
        pruner = tp.pruner.BasePruner(
            net,
            batch,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=FRACTION,
            ignored_layers=ignored,
            num_heads=heads,
            output_transform=lambda out: [t for t in tensors_in(out) if t.grad_fn is not None],
            forward_fn=call,
        )
        pruner.step()
        set_head_sizes(net, pruner.num_heads)
        row["removed"] = round(1 - count(net) / count(model), 4)
        with torch.no_grad():
            after = [t.shape for t in tensors_in(call(net, batch))]
    except Exception as error:  # its outcome, whatever it is
        return row | {"reason": f"{type(error).__name__}: {first_line(error)}"}
    return row | {"outcome": "pruned" if after == before else "outputs changed shape"}


def last_layers(
    model: nn.Module, batch: Batch, kinds: Iterable[type[nn.Module]]
) -> tuple[list[torch.Size], list[nn.Module]]:
    """The shapes of the model's outputs, and the layers of these kinds with no other between them and an output."""
    made_by: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        made_by.update({t.grad_fn: module for t in tensors_in(output) if t.grad_fn is not None})

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, tuple(kinds))]
    with torch.enable_grad():
        outputs = list(tensors_in(call(model, batch)))
    for hook in hooks:
        hook.remove()
    left = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, found = set(left), dict[nn.Module, None]()
    while left:
        node = left.pop()
        if node in made_by:
            found[made_by[node]] = None
            continue
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        left += new
    return [t.shape for t in outputs], list(found)


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Projection, or PyTorch's attention, -> its number of heads, which its module or its config holds."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[module] = module.num_heads
        queries = _number(module, COUNTS)
        if not queries:
            continue
        keys = _number(module, ("num_key_value_heads",)) or queries
        for name, child in module.named_children():
            heads = queries if name in QUERIES else keys if name in KEYS_VALUES else 0
            if heads and isinstance(child, nn.Linear) and child.out_features % heads == 0:
                found[child] = heads
    return found


def set_head_sizes(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """The sizes that attention modules hold, from the projections that the cut left them."""
    for module in model.modules():
        named = [(n, c) for n, c in module.named_children() if n in QUERIES and c in heads]
        for name, projection in named[:1]:
            packed = 3 if name in ("qkv", "in_proj", "Wqkv", "query_key_value") else 1
            width = projection.out_features // packed
            for attribute in COUNTS:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, heads[projection])
            for attribute in HEAD_SIZES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, width // heads[projection])
            if isinstance(getattr(module, "all_head_size", None), int):
                module.all_head_size = width


def _number(module: nn.Module, names: Iterable[str]) -> int:
    """The first of these integers that the module holds, itself or in its `config`; 0 if there is none."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
