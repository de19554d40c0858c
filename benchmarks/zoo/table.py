"""The summary of the zoo's results as Markdown: totals per collection, and every model that fell short with its reason.

python -m benchmarks.zoo.table [benchmarks/zoo/results.jsonl] > benchmarks/zoo/results.md
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.zoo.run import RESULTS, read

ENOUGH = 0.10
Row = dict[str, Any]


#: What became of Torch-Pruning's models, and the heads of its columns.
PEER_ENDS = {
    "good": "Torch-Pruning: pruned ≥ 10 %, same shapes",
    "of": "of models",
    "less": "less than 10 %",
    "outputs changed shape": "outputs of other shapes",
    "failed": "an error",
    "timed out": "out of time",
    "crashed": "crashed",
}


def main() -> None:
    rows = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    built = [row for row in rows if row["outcome"] != "not built"]
    print("# Results of the zoo\n")
    print("25 % of the channels, defaults, one call, float64 proof. Made by `benchmarks.zoo.table`.\n")
    print(_commits(rows))
    heads = ["collection", "models", "crashed or out of time", "pruned ≥ 10 % and proven", "of models"]
    heads += PEER_ENDS.values()
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for collection in [*dict.fromkeys(row["collection"] for row in built), "all"]:
        print(_totals(collection, [r for r in built if collection in (r["collection"], "all")]))
    print(_peer_note(built))
    short = [row for row in built if not passes(row)]
    print("\n## Short of 10 %, not proven or refused\n\n| model | outcome | removed | why |\n|---|---|---|---|")
    for row in short:
        removed = f"{row['removed']:.1%}" if "removed" in row else ""
        print(f"| {row['collection']}/{row['model']} | {row['outcome']} | {removed} | {_why(row)} |")
    print("\n## Proof\n\n| what was proven | models |\n|---|---|")
    for kind, number in Counter(map(_proof, filter(passes, built))).most_common():
        print(f"| {kind} | {number} |")
    left = [row for row in rows if row["outcome"] == "not built"]
    print(f"\n## Not built here: {len(left)}\n")
    print("Neither counted for nor against: no tiny configuration or input was found by this benchmark.\n")
    for row in left:
        print(f"- {row['collection']}/{row['model']}: {_cell(row['reason'])}")


def passes(row: Row) -> bool:
    """Pruned by at least a tenth of its parameters, proven, with finite outputs."""
    return row["outcome"] == "pruned" and row["removed"] >= ENOUGH and row["cut_error"] is not None and row["finite"]


def _commits(rows: list[Row]) -> str:
    """Which commit of this repository made the rows."""
    told = f"All {len(rows)} rows are of commit {', '.join(sorted({row['commit'] for row in rows}))}"
    peers = sorted({row["torch_pruning"]["commit"] for row in rows if "torch_pruning" in row})
    return f"{told}, those of Torch-Pruning of {', '.join(peers)}.\n" if peers else f"{told}.\n"


def _totals(collection: str, rows: list[Row]) -> str:
    good = sum(map(passes, rows))
    crashed = sum(row["outcome"] in ("crashed", "timed out") for row in rows)
    peers = Counter(_peer_end(row["torch_pruning"]) for row in rows if "torch_pruning" in row)
    cells = [len(rows), crashed, good, f"{good / len(rows):.1%}", peers["good"]]
    cells += [f"{peers['good'] / peers.total():.1%}" if peers else "", *(peers[end] for end in list(PEER_ENDS)[2:])]
    return f"| {collection} | " + " | ".join(map(str, cells)) + " |"


def _peer_end(peer: Row) -> str:
    if peer["outcome"] == "pruned":
        return "good" if peer["removed"] >= ENOUGH else "less"
    return str(peer["outcome"])


def _peer_note(built: list[Row]) -> str:
    """How to read Torch-Pruning's columns."""
    compared = sum("torch_pruning" in row for row in built)
    return (
        f"\nTorch-Pruning was run on {compared} of the {len(built)} models. Its outputs are checked in shape, ours "
        f"in value: it does not say what the smaller model should compute. What it was given is in the README."
    )


def _why(row: Row) -> str:
    if "reason" in row:
        return _cell(row.get("message", row["reason"]))
    if row["cut_error"] is None:
        return _cell(f"Not proven. {row['proof']}")
    return "; ".join(f"{n} × {_cell(reason)}" for reason, n in list(row["kept_whole"].items())[:3])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def _proof(row: Row) -> str:
    if row["proof"].startswith("The cut model equals"):
        return "equals the zeroed original within 1e-10 in float64"
    return "equals it within 1e-10 for the exact groups; with the others it runs with finite outputs"


if __name__ == "__main__":
    main()
