"""Prunes every model of the zoo, each in a process of its own, and writes a line of JSON per model.

    python -m benchmarks.zoo.run [--only transformers] [--models bert,gpt2] [--again]

Stops and goes on: what has a line is not run again. `python -m benchmarks.zoo.table` makes the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

SECONDS, PEER_SECONDS = 180, 30
BYTES = 6 << 30
RESULTS = Path(__file__).parent / "results.jsonl"


def collections() -> dict[str, Any]:
    """Name -> a function that lists the entries of that collection."""
    from benchmarks.zoo import recurrent, speech, timm_models, torchvision_models, transformers_models

    return {
        "recurrent": recurrent.entries,
        "speech": speech.entries,
        "torchvision": torchvision_models.entries,
        "timm": timm_models.entries,
        "transformers": transformers_models.entries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="collections, separated by commas")
    parser.add_argument("--models", default="", help="models, separated by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="run what has a line already")
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    args = parser.parse_args()
    prepare()
    wanted, models = set(filter(None, args.only.split(","))), set(filter(None, args.models.split(",")))
    done = {} if args.again else {(r["collection"], r["model"]): r for r in read(args.results)}
    for collection, entries in collections().items():
        if wanted and collection not in wanted:
            continue
        for entry in entries():
            key = {"collection": collection, "model": entry.name}
            if models and entry.name not in models:
                continue
            row = done.get((collection, entry.name), {})
            if "outcome" not in row:
                row = key | in_a_process("examine", entry, SECONDS)
                write(args.results, row)
                told = row.get("removed", row.get("reason", ""))
                print(f"{collection}/{entry.name}: {row['outcome']} {told}", flush=True)
            if not args.no_peer and "torch_pruning" not in row and row["outcome"] != "not built":
                write(args.results, key | {"torch_pruning": in_a_process("examine_peer", entry, PEER_SECONDS)})


def write(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def prepare() -> None:
    """Quiet, offline, one thread; heavy imports once, before processes are forked."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()


def in_a_process(task: str, entry: Any, limit: int) -> dict[str, Any]:
    """What the task says of one model; a process that runs out of time or memory, or dies, is an outcome too."""
    from benchmarks.zoo import one

    read_end, write_end = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        signal.alarm(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        silence()
        with os.fdopen(write_end, "w") as pipe:
            pipe.write(json.dumps(getattr(one, task)(entry)))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    seconds = round(time.perf_counter() - start, 1)
    died = f"its process ended with signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {status}"
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return {"outcome": "timed out" if timed_out else "crashed", "reason": died, "seconds": seconds}


def silence() -> None:
    """Libraries print as they build; only the rows matter."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def read(path: Path) -> list[dict[str, Any]]:
    """Every model's row; later lines add to earlier ones or replace them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        key = (row["collection"], row["model"])
        rows[key] = row if "outcome" in row else rows.get(key, {}) | row
    return list(rows.values())


if __name__ == "__main__":
    main()
