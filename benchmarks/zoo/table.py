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


def main() -> None:
    rows = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    built = [row for row in rows if row["outcome"] != "not built"]
    print("# Results of the zoo\n")
    print("25 % of the channels, defaults, one call, float64 proof. Made by `benchmarks.zoo.table`.\n")
    heads = ("collection", "models", "crashed or out of time", "pruned ≥ 10 % and proven", "of models")
    peers = ("Torch-Pruning: models run", "runs, pruned ≥ 10 %", "of these, outputs of the same shape")
    print(_runs(built))
    print("| " + " | ".join(heads + peers) + " |")
    print("|---" * len(heads + peers) + "|")
    for collection in [*dict.fromkeys(row["collection"] for row in built), "all"]:
        print(_totals(collection, [r for r in built if collection in (r["collection"], "all")]))
    short = [row for row in built if not passes(row)]
    print("\n## Short of 10 % or refused\n\n| model | outcome | removed | why |\n|---|---|---|---|")
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
    return row["outcome"] == "pruned" and row["removed"] >= ENOUGH and bool(row["proof"]) and row["finite"]


def _runs(rows: list[Row]) -> str:
    """How many rows come from which run, where more than one made the results."""
    runs = Counter(row["run"] for row in rows if "run" in row)
    if len(runs) < 2:
        return ""
    told = ", ".join(f"{n} from the {run} run" for run, n in runs.most_common())
    return f"Rows of runs at different commits: {told}; `results.jsonl` says which.\n"


def _totals(collection: str, rows: list[Row]) -> str:
    good = sum(map(passes, rows))
    crashed = sum(row["outcome"] in ("crashed", "timed out") for row in rows)
    peers = [row["torch_pruning"] for row in rows if "torch_pruning" in row]
    cut = [p for p in peers if p.get("removed", 0.0) >= ENOUGH]
    same = sum(p["outcome"] == "pruned" for p in cut)
    share = f"{good / len(rows):.1%}"
    return f"| {collection} | {len(rows)} | {crashed} | {good} | {share} | {len(peers)} | {len(cut)} | {same} |"


def _why(row: Row) -> str:
    if "reason" in row:
        return _cell(row["reason"])
    return "; ".join(f"{n} × {_cell(reason)}" for reason, n in list(row["kept_whole"].items())[:3])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def _proof(row: Row) -> str:
    if row["cut_error"] is None or row["proof"].startswith("The cut model is not"):
        return "runs with finite outputs, not compared: no group is exact, or exact ones were not proven apart"
    if row["proof"].startswith("The cut model equals"):
        return "equals the zeroed original within 1e-10 in float64"
    return "equals it within 1e-10 for the exact groups; with the others it runs with finite outputs"


if __name__ == "__main__":
    main()
