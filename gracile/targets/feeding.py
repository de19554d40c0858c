"""Batches as the named inputs of a runtime, and its outputs as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gracile.data import Batch
from gracile.errors import DataError
from gracile.targets.base import Outputs


def named_inputs(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    """The batch's items by input name, in the order of the names.

    A tensor is the one input; of a tuple or list the first as many items as there are names; of a dict the items named.
    Raises DataError where one is missing.
    """
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise DataError(
                f"The exported model has the inputs {', '.join(names)}; the batch has no {', '.join(missing)}.\n"
                f"  It has: {', '.join(map(str, batch))}. Export again with an example that has the same keys."
            )
        return {name: batch[name] for name in names}
    values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if len(values) < len(names):
        raise DataError(f"The exported model has the inputs {', '.join(names)}; the batch has {len(values)}.")
    return dict(zip(names, values))


def feeds_of(batch: Batch, names: Sequence[str], dtypes: Sequence[np.dtype[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs of a batch (see `named_inputs`) as contiguous arrays of the types given."""
    return {name: _array(value, dtype) for (name, value), dtype in zip(named_inputs(batch, names).items(), dtypes)}


def outputs_of(names: Sequence[str], arrays: Sequence[NDArray[Any]]) -> Any:
    """One output as a tensor, several as `Outputs`."""
    return outputs_from(names, [torch.from_numpy(array) for array in arrays])


def outputs_from(names: Sequence[str], tensors: Sequence[Tensor]) -> Any:
    """One tensor as it is, several as `Outputs` by name."""
    return tensors[0] if len(tensors) == 1 and names[0] == "output" else Outputs(zip(names, tensors))


def _array(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.numpy()
    return np.ascontiguousarray(value, dtype=dtype)
