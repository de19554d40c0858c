"""Prunes every model of the zoo, each in a process of its own, and writes a line of JSON per model.

    python -m benchmarks.zoo.run [--only transformers] [--models bert,gpt2] [--no-peer]

Stops and goes on: what has a line is not run again. Every line holds the commit that made it, and a file holds lines of
one commit only. `python -m benchmarks.zoo.table` makes the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Processor time that a model may take, with building it: the machine may be busy with other things.
CPU_SECONDS, PEER_CPU_SECONDS = 300, 30
#: A process that only waits uses no processor time and is ended after this many times its limit by the clock.
PATIENCE = 20
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
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    args = parser.parse_args()
    prepare()
    wanted, models = set(filter(None, args.only.split(","))), set(filter(None, args.models.split(",")))
    commit = present_commit()
    done = {(r["collection"], r["model"]): r for r in read(args.results)}
    made = {row.get("commit") for row in done.values()}
    if not args.no_peer:
        made |= {row["torch_pruning"].get("commit") for row in done.values() if "torch_pruning" in row}
    if others := made - {commit}:
        sys.exit(f"{args.results} holds rows of {others}, not of {commit}. Move it away, or check out theirs.")
    for collection, entries in collections().items():
        if wanted and collection not in wanted:
            continue
        for entry in entries():
            key = {"collection": collection, "model": entry.name}
            if models and entry.name not in models:
                continue
            row = done.get((collection, entry.name), {})
            if "outcome" not in row:
                row = key | {"commit": commit} | in_a_process("examine", entry, CPU_SECONDS)
                write(args.results, row)
                told = row.get("removed", row.get("reason", ""))
                print(f"{collection}/{entry.name}: {row['outcome']} {told}", flush=True)
            if not args.no_peer and "torch_pruning" not in row and row["outcome"] != "not built":
                peer = {"commit": commit} | in_a_process("examine_peer", entry, PEER_CPU_SECONDS)
                write(args.results, key | {"torch_pruning": peer})


def present_commit() -> str:
    """The commit checked out, marked if a file of the repository differs from it."""
    here = Path(__file__).parent
    told = [["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
    head, changed = (subprocess.check_output(["git", *words], cwd=here, text=True).strip() for words in told)
    return f"{head} with changes" if changed else head


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
    child = os.fork()
    if child == 0:
        os.close(read_end)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        signal.alarm(PATIENCE * limit)
        silence()
        with os.fdopen(write_end, "w") as pipe:
            pipe.write(json.dumps(getattr(one, task)(entry)))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status, used = os.wait4(child, 0)
    if text:
        return dict(json.loads(text))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    end = signal.Signals(number).name if number else f"exit status {os.WEXITSTATUS(status)}"
    outcome = "timed out" if number in (signal.SIGXCPU, signal.SIGALRM) else "crashed"
    seconds = round(used.ru_utime + used.ru_stime, 1)
    return {"outcome": outcome, "reason": f"its process ended with {end}", "cpu_seconds": seconds}


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
