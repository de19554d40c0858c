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
from pathlib import Path

from gracile.files import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=60.0, help="Seconds from start to kill, at most.")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    kills, runs, different, redone = 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        while kills < arguments.kills:
            folder = Path(temporary) / str(runs)
            folder.mkdir()
            killed, again = interrupted(folder, arguments.kills - kills, chance, arguments.longest)
            seed_decisions(folder / "killed-run", folder / "whole-run")
            finish(command(folder, "whole"))
            digests = [sha256_file(folder / name / "model.safetensors") for name in ("killed", "whole")]
            print(f"run {runs}: {killed} kills; weights {digests[0][:16]}, uninterrupted {digests[1][:16]}", flush=True)
            kills, runs, redone = kills + killed, runs + 1, redone + again
            different += digests[0] != digests[1]
    print(f"{kills} kills in {runs} runs (seed {arguments.seed}): {different} ended with other weights than without,")
    print(f"{redone} files of finished steps and decisions were written again")
    sys.exit(1 if different or redone else 0)


def command(folder: Path, name: str) -> list[str]:
    """The command line of one run; always the same for a name."""
    return [
        *(sys.executable, "-m", "gracile", "optimize", "gracile.demo:load_model", "--data", "gracile.demo:load_data"),
        *("--target", "onnxruntime", "--max-drop", "0.03", "--limit", "latency=0.6", "--epochs", "2", "--quiet"),
        *("--out", str(folder / name), "--run-dir", str(folder / f"{name}-run")),
    ]


def interrupted(folder: Path, kills: int, chance: random.Random, longest: float) -> tuple[int, int]:
    """One run, killed up to so often until it is done: how often, and how many finished files were written again."""
    kept: dict[str, tuple[int, int]] = {}
    done = redone = 0
    while True:
        process = start(command(folder, "killed"))
        delay = chance.uniform(3.0, longest)  # before 3 s there are only imports
        try:
            process.wait(delay if done < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            done += 1
        code = process.wait()
        found = finished_files(folder / "killed-run")
        redone += sum(found.get(path, identity) != identity for path, identity in kept.items())
        kept = found
        print(f"  ended with {code}: {len(found)} files of finished steps and decisions", file=sys.stderr, flush=True)
        if code not in (0, 3, -signal.SIGKILL):
            sys.exit(f"it failed; run it by hand: {' '.join(command(folder, 'killed'))}")
        if code in (0, 3):
            return done, redone


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
