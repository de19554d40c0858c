"""Integer attributes of PyTorch's own layers that state a size of their weights without the forward reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gracile.graph.algebra import split_expr
from gracile.graph.axes import Expr, size
from gracile.graph.integers import Attribute, Constraint

#: Layer class -> (attribute, parameter or buffer, axis).
SIMPLE: dict[type[nn.Module], tuple[tuple[str, str, int], ...]] = {
    nn.Linear: (("in_features", "weight", 1), ("out_features", "weight", 0)),
    _NormBase: (("num_features", "weight", 0), ("num_features", "running_mean", 0)),
    nn.GroupNorm: (("num_channels", "weight", 0),),
    nn.Embedding: (("embedding_dim", "weight", 1), ("num_embeddings", "weight", 0)),
    nn.EmbeddingBag: (("embedding_dim", "weight", 1), ("num_embeddings", "weight", 0)),
    nn.RNNBase: (("input_size", "weight_ih_l0", 1), ("hidden_size", "weight_hh_l0", 1)),
    nn.RNNCellBase: (("input_size", "weight_ih", 1), ("hidden_size", "weight_hh", 1)),
    nn.PReLU: (("num_parameters", "weight", 0),),
}


def declared_constraints(model: nn.Module, axes: Mapping[str, list[Expr]]) -> Iterator[Constraint]:
    """For every such attribute, the dimension whose size it states."""
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        for attribute, dim in _stated(module, axes, names):
            value = module.__dict__.get(attribute)
            if isinstance(value, int) and value == size(dim):
                full = f"{path}.{attribute}" if path else attribute
                yield Constraint(Attribute(full, None, int(value)), dim, f"'{full}'")
        if isinstance(module, nn.LayerNorm) and isinstance(module.weight, Tensor):
            full = f"{path}.normalized_shape" if path else "normalized_shape"
            for i, dim in enumerate(axes[names[id(module.weight)]]):
                yield Constraint(Attribute(full, i, size(dim)), dim, f"'{full}'")


def _stated(module: nn.Module, axes: Mapping[str, list[Expr]], names: Mapping[int, str]) -> Iterator[tuple[str, Expr]]:
    for kind, entries in SIMPLE.items():
        if isinstance(module, kind):
            for attribute, held, axis in entries:
                tensor = getattr(module, held, None)
                if isinstance(tensor, Tensor) and id(tensor) in names:
                    yield attribute, axes[names[id(tensor)]][axis]
    if isinstance(module, _ConvNd) and id(module.weight) in names:
        first, second = axes[names[id(module.weight)]][:2]
        groups = int(module.groups)
        halves = split_expr(first, groups)
        grouped = (*(halves[0] if halves else ()), *second)
        transposed = isinstance(module, _ConvTransposeNd)
        yield "in_channels", first if transposed else grouped
        yield "out_channels", grouped if transposed else first
        if halves and groups > 1:
            yield "groups", halves[0]
