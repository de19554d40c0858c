"""Which weights share a scale: a tensor seen as rows, one scale per row, whatever the granularity."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from gracile.errors import ConfigError
from gracile.formats.base import Granularity, PerChannel, PerGroup, PerTensor, PerToken

Shape = tuple[int, ...]


def scale_shape(granularity: Granularity, shape: Shape) -> Shape:
    """Shape of `scale` for a weight of this shape; raises ConfigError where the granularity does not fit it."""
    shape = tuple(shape)
    if 0 in shape:
        raise ConfigError(f"A weight of shape {shape} holds nothing to encode.")
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        return (shape[_axis(granularity, shape)],)
    if isinstance(granularity, PerGroup):
        rows, columns = _rows_and_columns(shape)
        return (rows, -(-columns // granularity.size))
    if isinstance(granularity, PerToken):
        raise ConfigError("PerToken() is for inputs.\n  Weights take PerTensor(), PerChannel() or PerGroup(n).")
    raise ConfigError(
        f"{type(granularity).__name__} is not a granularity. Use PerTensor(), PerChannel() or PerGroup(n)."
    )


def to_rows(granularity: Granularity, tensor: Tensor) -> Tensor:
    """The tensor as [scales, weights that share one], scales in the order of the flattened `scale`.

    A last group that is shorter than the others is filled up with zeros.
    """
    shape = tuple(tensor.shape)
    scales = math.prod(scale_shape(granularity, shape))
    if isinstance(granularity, PerChannel):
        tensor = tensor.movedim(_axis(granularity, shape), 0)
    if isinstance(granularity, PerGroup):
        tensor = tensor.reshape(shape[0], -1)
        tensor = functional.pad(tensor, (0, -tensor.shape[1] % granularity.size))
    return tensor.reshape(scales, -1)


def from_rows(granularity: Granularity, rows: Tensor, shape: Shape) -> Tensor:
    """Inverse of `to_rows`: the tensor of this shape, contiguous."""
    shape = tuple(shape)
    if isinstance(granularity, PerChannel):
        axis = _axis(granularity, shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return rows.reshape(moved).movedim(0, axis).contiguous()
    if isinstance(granularity, PerGroup):
        height, width = _rows_and_columns(shape)
        return rows.reshape(height, -1)[:, :width].reshape(shape).contiguous()
    return rows.reshape(shape)


def _axis(granularity: PerChannel, shape: Shape) -> int:
    if not -len(shape) <= granularity.axis < len(shape):
        raise ConfigError(f"PerChannel(axis={granularity.axis}): a weight of shape {shape} has no such axis.")
    return granularity.axis % len(shape)


def _rows_and_columns(shape: Shape) -> tuple[int, int]:
    if not shape:
        raise ConfigError("PerGroup: a weight with no dimensions has no rows.\n  Use PerTensor().")
    return shape[0], math.prod(shape[1:])
