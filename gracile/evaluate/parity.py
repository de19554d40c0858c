"""Whether two runs of a model agree: the exported one and the one in PyTorch, or before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gracile.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far outputs are from their reference, over all output tensors.

    max_error, mean_error: of |output − reference|. scale: largest |reference|, to judge the errors by.
    agreement: share of equal argmax over the last axis of the main output; None where it is no row of class scores.
    """

    max_error: float
    mean_error: float
    scale: float
    agreement: float | None

    @property
    def relative_error(self) -> float:
        """max_error / scale; 0 where both are 0."""
        return self.max_error / self.scale if self.scale else self.max_error

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_parity(reference: Any, outputs: Any) -> Parity:
    """Errors and agreement of `outputs` against `reference`.

    Both: a tensor, or nested tuples, lists or mappings of tensors (Hugging Face outputs too), compared in order.
    Raises DataError where their number or shapes differ, or the outputs are not finite where the reference is.
    """
    pairs = list(zip(_tensors(reference), _tensors(outputs)))
    if not pairs or len(_tensors(reference)) != len(_tensors(outputs)):
        raise DataError(
            f"Parity: the reference has {len(_tensors(reference))} output tensors, the other {len(_tensors(outputs))}."
        )
    largest, scale, total, count = 0.0, 0.0, 0.0, 0
    for index, (expected, found) in enumerate(pairs):
        if expected.shape != found.shape:
            raise DataError(
                f"Parity: output {index} has shape {tuple(found.shape)}, the reference {tuple(expected.shape)}."
            )
        if bool((torch.isfinite(expected) & ~torch.isfinite(found)).any()):
            raise DataError(f"Parity: output {index} is not finite where the reference is.")
        kept = torch.isfinite(expected)
        error = (found[kept] - expected[kept]).abs()
        largest = max(largest, float(error.max()) if error.numel() else 0.0)
        scale = max(scale, float(expected[kept].abs().max()) if error.numel() else 0.0)
        total += float(error.sum())
        count += error.numel()
    return Parity(
        max_error=largest, mean_error=total / max(count, 1), scale=scale, agreement=_agreement(*pairs[0], reference)
    )


def _agreement(expected: Tensor, found: Tensor, reference: Any) -> float | None:
    """Share of equal argmax; class scores are [..., classes] with 2 or more, returned alone or as `logits`."""
    named = not isinstance(reference, Tensor) and hasattr(reference, "keys") and "logits" not in reference
    if named or expected.ndim < 2 or expected.shape[-1] < 2 or expected.numel() == 0:
        return None
    return float((expected.argmax(-1) == found.argmax(-1)).double().mean())


def _tensors(outputs: Any) -> list[Tensor]:
    if hasattr(outputs, "values") and not isinstance(outputs, Tensor):
        outputs = list(outputs.values())
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.detach().cpu().double() for leaf in leaves if isinstance(leaf, Tensor)]
