"""Latency tables kept on disk: for one machine, runtime and model, so that a second run need not measure again."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from gracile.config import to_config
from gracile.data import Batch
from gracile.environment import OPTIONAL, cpu_model, instruction_set, package_version
from gracile.errors import RunError
from gracile.files import cache_directory, sha256_json, write_json

#: Version of the file's form, and of how its numbers are measured; files of another are ignored.
SCHEMA = 1


class LatencyCache:
    """Shares of the whole model's latency that widths save, by signature of a group and units removed.

    One file in `cache_directory()`/latency for each identity (see `identity_of`). A file that is damaged, or of another
    identity or schema, is ignored with a note, and replaced. A disk that takes no file is a note too.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.path = cache_directory() / "latency" / f"{sha256_json(identity)[:24]}.json"
        self.notes: list[str] = []
        self.shares: dict[str, dict[int, float]] = {}
        try:
            self.shares = self._read()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.notes.append(f"The latency table '{self.path}' cannot be used ({error!r}) and was measured again.")

    def get(self, signature: str, removed: int) -> float | None:
        """The share saved, or None where it was not measured yet."""
        return self.shares.get(signature, {}).get(removed)

    def put(self, signature: str, removed: int, share: float) -> None:
        """Keep a share, on disk too."""
        self.shares.setdefault(signature, {})[removed] = share
        rows = {name: {str(count): value for count, value in row.items()} for name, row in self.shares.items()}
        try:
            write_json(self.path, {"schema": SCHEMA, "identity": self.identity, "shares": rows})
        except RunError as error:
            note = f"The latency table is not kept: {str(error).splitlines()[0]}"
            self.notes += [] if note in self.notes else [note]

    def _read(self) -> dict[str, dict[int, float]]:
        found = json.loads(self.path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or found["identity"] != json.loads(json.dumps(self.identity)):
            raise ValueError("it belongs to another version or machine")
        rows = {str(name): {int(n): float(v) for n, v in row.items()} for name, row in found["shares"].items()}
        if not all(math.isfinite(value) and value < 1 for row in rows.values() for value in row.values()):
            raise ValueError("it holds what is no share of a latency")
        return rows


def identity_of(model: nn.Module, macs: int, target: Any, batch: Batch) -> dict[str, Any]:
    """All that a latency depends on, as plain data: processor, runtime with settings and versions, batch, structure."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    state = {name: [str(t.dtype), *t.shape] for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return {
        "processor": cpu_model(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "target": to_config(target),
        "versions": {name: package_version(name) for name in ("gracile", "torch", *OPTIONAL)},
        "batch": [[str(leaf.dtype), *leaf.shape] for leaf in leaves],
        "model": sha256_json([type(model).__qualname__, repr(model), state, macs]),
    }
