"""Kill `gracile optimize` with -9 at random moments, start the same command again, and compare the final weights.

    python benchmarks/kill_resume.py --kills 20

The model and data are the demo's; runtime, export and clock are the real ones. Real latencies differ from run to run,
so that two whole runs may rightly choose other widths. Therefore the uninterrupted run compared with starts with what
the killed one had decided (its measurements), and makes every model anew: same decisions, same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gracile.files import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20.0, help="Seconds from start to kill, at most.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        redone = interrupted(folder, arguments.kills, random.Random(arguments.seed), arguments.longest)
        start = time.monotonic()
        seed_decisions(folder / "killed-run", folder / "whole-run")
        finish(command(folder, "whole"))
        whole = time.monotonic() - start
        digests = {name: sha256_file(folder / name / "model.safetensors") for name in ("killed", "whole")}
    same = digests["killed"] == digests["whole"]
    print(f"kills: {arguments.kills} (seed {arguments.seed}); the whole run, decisions given: {whole:.0f} s")
    print(f"weights of the killed run: {digests['killed']}")
    print(f"weights of the whole run:  {digests['whole']} ({'the same' if same else 'DIFFERENT'})")
    print(f"finished steps and decisions written again: {len(redone)}" + "".join(f"\n  {path}" for path in redone))
    sys.exit(0 if same and not redone else 1)


def command(folder: Path, name: str) -> list[str]:
    """The command line of one run; always the same for a name."""
    return [
        *(sys.executable, "-m", "gracile", "optimize", "gracile.demo:load_model", "--data", "gracile.demo:load_data"),
        *("--target", "onnxruntime", "--max-drop", "0.03", "--limit", "latency=0.6", "--epochs", "2", "--quiet"),
        *("--out", str(folder / name), "--run-dir", str(folder / f"{name}-run")),
    ]


def interrupted(folder: Path, kills: int, chance: random.Random, longest: float) -> list[str]:
    """Kill so often, then let it finish; returns finished files that were written a second time."""
    kept: dict[str, tuple[int, int]] = {}
    redone: list[str] = []
    done = 0
    while done < kills:
        process = start(command(folder, "killed"))
        delay = chance.uniform(3.0, longest)  # before 3 s there are only imports
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        found = finished_files(folder / "killed-run")
        redone += [path for path, identity in kept.items() if found.get(path, identity) != identity]
        kept = found
        print(f"killed {done} times; after {delay:4.1f} s: {len(found)} finished files", file=sys.stderr)
        if process.returncode == 0:
            print("the run was done before all kills; further ones hit the reading of it", file=sys.stderr)
    finish(command(folder, "killed"))
    found = finished_files(folder / "killed-run")
    return redone + [path for path, identity in kept.items() if found.get(path, identity) != identity]


def start(line: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(line: list[str]) -> None:
    """Run to the end; 3 is a goal that was not met, with the best saved."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(line)} failed:\n{done.stderr}")


def finished_files(run: Path) -> dict[str, tuple[int, int]]:
    """Path -> inode and time of change of every file of a finished step or a decision."""
    files = [*run.rglob("steps/[0-9][0-9]/*"), *run.rglob("decisions/[!.]*"), *run.rglob("run.json")]
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def seed_decisions(source: Path, destination: Path) -> None:
    """A run directory that holds what was decided, and none of the models."""
    destination.mkdir()
    shutil.copytree(source / "decisions", destination / "decisions")
    shutil.copy2(source / "run.json", destination / "run.json")


if __name__ == "__main__":
    main()
