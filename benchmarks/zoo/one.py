"""One model of the zoo: built, cut by a quarter of its channels with the defaults in one call, and compared."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gracile
from benchmarks.zoo.entry import Batch, CannotBuild, Entry
from gracile.errors import GracileError
from gracile.graph.values import tensors_in

FRACTION = 0.25
#: A model counts where the input found makes at least this share of its parameters work.
MOST = 0.5


def examine(entry: Entry) -> dict[str, Any]:
    """Our outcome: "pruned", "refused" (a clear error of ours), "crashed" or "not built"."""
    try:
        model, batch = _built(entry)
    except CannotBuild as error:
        return {"outcome": "not built", "reason": str(error)}
    row: dict[str, Any] = {"parameters": count(model)}
    start = time.process_time()
    try:
        row |= prune(model, batch)
    except GracileError as error:
        row |= {"outcome": "refused", "reason": " ".join(str(error).split())[:200], "message": str(error)[:1500]}
    except Exception as error:  # anything else is our defect
        row |= {"outcome": "crashed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    return row | {"cpu_seconds": round(time.process_time() - start, 2)}


def examine_peer(entry: Entry) -> dict[str, Any]:
    """Torch-Pruning's outcome on the same model: "pruned", "outputs changed shape" or "failed"."""
    from benchmarks.zoo.peer import torch_pruning

    return torch_pruning(*_built(entry))


def _built(entry: Entry) -> tuple[nn.Module, Batch]:
    warnings.filterwarnings("ignore")
    try:
        model, batch = entry.build()
    except CannotBuild:
        raise
    except Exception as error:  # a library that cannot build one of its own models
        raise CannotBuild(f"{type(error).__name__}: {first_line(error)}") from error
    if count(model) == 0:
        raise CannotBuild("it has no parameters")
    used = share_used(model, batch)
    if used < MOST:
        raise CannotBuild(f"the input found uses {used:.0%} of its parameters")
    return model, batch


def share_used(model: nn.Module, batch: Batch) -> float:
    """How many of its parameters some operator reads in one forward, as a share: a part may wait for other inputs."""
    with torch.no_grad(), _Reads() as reads:
        call(model, batch)
    return sum(p.numel() for p in model.parameters() if id(p) in reads.seen) / count(model)


class _Reads(TorchDispatchMode):
    """Notes every tensor that an operator is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.update(id(tensor) for tensor in tensors_in([args, kwargs or {}]))
        return func(*args, **(kwargs or {}))


def prune(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The one call, and what came of it."""
    step = gracile.Prune(FRACTION, pattern=gracile.Channels())
    result = gracile.compress(model, step, gracile.Data(calibration=[batch]))
    record = result.report.steps[0]
    after = count(result.model)
    with torch.no_grad():
        before, outputs = (list(tensors_in(call(m, batch))) for m in (model, result.model))
    return {
        "outcome": "pruned",
        "parameters_after": after,
        "removed": round(1 - after / count(model), 4),
        "cut_error": record.numbers.get("cut_error"),
        "finite": all(_as_finite_as(*pair) for pair in zip(before, outputs)),
        "proof": next((note for note in record.notes if "zeroed" in note), ""),
        "groups": sum(1 for r in record.layers if r.action == "cut"),
        "kept_whole": reasons(record.layers),
    }


def _as_finite_as(before: Tensor, after: Tensor) -> bool:
    """Whether the output has no NaN and no more infinities than the original's: masked scores are -∞.

    Where they stand may differ: what is ranked by scores is ranked anew.
    """
    if after.isfinite().all():
        return True
    if bool((after.isnan().sum() > before.isnan().sum()).item()):
        return False
    return after.shape == before.shape and bool(((~after.isfinite()).sum() <= (~before.isfinite()).sum()).item())


def reasons(rows: Any) -> dict[str, int]:
    """Why groups were left whole, with how many units each reason keeps, the most first."""
    found: dict[str, int] = {}
    for row in rows:
        if row.action == "skipped":
            found[row.reason] = found.get(row.reason, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def call(model: nn.Module, batch: Batch) -> Any:
    """The model on the batch, as `gracile.Data` feeds it."""
    return gracile.Data(calibration=[batch]).forward(model, batch)


def count(model: nn.Module) -> int:
    """How many numbers its parameters are."""
    return sum(math.prod(p.shape) for p in model.parameters())


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
