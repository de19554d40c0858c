"""A small `optimize` or `compress` run for the tests that kill it: python resumable_run.py MODE RUN_DIR LOG OUT.

Everything is seeded. One thing is replaced: the clock. Real latencies differ from run to run, so that two whole runs
may rightly choose other widths, and equal weights would prove nothing; here a call is said to take a time that follows
from the multiply-accumulates of the model. The target writes the weights to a file and runs the model in PyTorch.

Every durable act (a step saved, a decision kept, an epoch kept) is written to LOG just after it was done. With
GRACILE_DIE_AT=n the process kills itself around the n-th rename of a file or directory: before it where n is even,
after it where n is odd.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gracile as gc
import gracile.measure
import gracile.search
from gracile import run_directory
from gracile.data import call_model
from gracile.evaluate.latency import Latency
from gracile.files import sha256_json
from gracile.nn import QuantizedLayer
from gracile.run_directory import RunDirectory
from gracile.steps import SGD
from gracile.steps.training.epochs import Epochs
from gracile.surgery import edit_to_json
from gracile.targets.base import Capabilities, Runner, Target


class TinyNet(nn.Module):
    """Two convolutions with batch norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(images)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).mean(dim=(2, 3)))


_loaded: dict[str, nn.Module] = {}


class _Runner(Runner):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: Any) -> Any:
        with torch.no_grad():
            return call_model(self.model, batch)


@dataclass(frozen=True)
class InProcess(Target):
    """PyTorch in this process; the file holds the weights, for its size."""

    name: ClassVar[str] = "in process"
    suffix: ClassVar[str] = ".safetensors"
    capabilities: ClassVar[Capabilities] = Capabilities(schemes=("W8A8",))

    def available(self) -> str | None:
        return None

    def export(
        self, model: nn.Module, example: Any, path: str | Path, *, feed: Callable[[Any], Any] | None = None
    ) -> Path:
        save_file({n: t.detach().contiguous().clone() for n, t in model.state_dict().items()}, path)
        _loaded[str(path)] = copy.deepcopy(model).eval()
        return Path(path)

    def load(self, path: str | Path) -> Runner:
        return _Runner(_loaded[str(path)])


@dataclass(frozen=True)
class Counted:
    """A call with the time it is said to take: 1 ms for a million multiply-accumulates, 0.6 of it in integers."""

    milliseconds: float

    def __call__(self) -> None:
        return None


def counted_call(measured: Any, batch: Any) -> Counted:
    integers = any(isinstance(m, QuantizedLayer) for m in measured.subject.model.modules())
    return Counted(measured.measurements[0].macs / 1e6 * (0.6 if integers else 1.0))


def counted_latency(runners: Mapping[str, Counted], **_: Any) -> dict[str, Latency]:
    def of(call: Counted) -> Latency:
        ms = call.milliseconds
        return Latency(p50_ms=ms, p95_ms=ms, samples=1, ratio=1.0, ratio_low=1.0, ratio_high=1.0)

    return {name: of(call) for name, call in runners.items()}


def replace_the_clock() -> None:
    """Times from multiply-accumulates, as said at the top; everything else is as users have it."""
    gracile.measure._timed_call = counted_call  # type: ignore[assignment]
    gracile.measure.measure_latency = counted_latency  # type: ignore[assignment]
    gracile.search.mixed_precision_pays = lambda model, data: False


def log_durable_acts(log: Path) -> None:
    """Append a line for each act after it was done, written through to the file at once."""

    def tell(*words: object) -> None:
        with log.open("a") as file:
            file.write(json.dumps(words) + "\n")

    finish_step, decide, finish_epoch = RunDirectory.finish_step, RunDirectory.decide, Epochs.finish_epoch

    def finishing(self: RunDirectory, index: int, *args: Any) -> None:
        finish_step(self, index, *args)
        tell("step", str(self.path), index)

    def deciding(self: RunDirectory, name: str, value: Any) -> None:
        decide(self, name, value)
        tell("decision", str(self.path), name)

    def training(self: Any, losses: Tensor) -> None:
        finish_epoch(self, losses)
        if len(self.history) > 1:  # the start, epoch 0, is judged and not kept
            tell("epoch", str(self.directory), len(self.history) - 1)

    RunDirectory.finish_step = finishing  # type: ignore[method-assign,assignment]
    RunDirectory.decide = deciding  # type: ignore[method-assign]
    Epochs.finish_epoch = training  # type: ignore[method-assign]


def die_at(count: int) -> None:
    """Kill this process, as with -9, before (even) or after (odd) the count-th rename."""
    rename = os.replace
    done = 0

    def dying(source: Any, destination: Any) -> None:
        nonlocal done
        done += 1
        if done == count and count % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, destination)
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying  # type: ignore[assignment]


def make_data() -> gc.Data:
    """Images of three kinds: brighter at the top, at the bottom, or nowhere; noisy."""
    generator = torch.Generator().manual_seed(1)

    def batches(count: int) -> list[tuple[Tensor, Tensor]]:
        made = []
        for _ in range(count):
            labels = torch.randint(0, 3, (32,), generator=generator)
            images = torch.randn(32, 1, 8, 8, generator=generator)
            images[labels == 0, :, :4] += 0.7
            images[labels == 1, :, 4:] += 0.7
            made.append((images, labels))
        return made

    training = batches(12)
    return gc.Data(
        calibration=training[:3],
        train=training,
        evaluation=batches(6),
        metric=gc.metrics.accuracy,
        loss=gc.losses.cross_entropy,
    )


def trained(data: gc.Data) -> TinyNet:
    torch.manual_seed(0)
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for images, labels in data.train or ():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def run(mode: str, folder: Path) -> gc.Result:
    data = make_data()
    model = trained(data)
    if mode == "optimize":
        goal = gc.Goal(target=InProcess(), max_drop=0.2, epochs=2, limits=(gc.Latency(0.4),))
        return gc.optimize(model, data, goal, seed=3, run_dir=folder)
    recipe = gc.Recipe(
        gc.Prune(0.3, criterion=gc.Taylor(), pattern=gc.Channels()),
        gc.Distill(epochs=8, optimizer=SGD(learning_rate=0.05)),
        gc.Quantize(gc.W8A8),
        gc.Finetune(epochs=3, optimizer=SGD(learning_rate=0.01)),
    )
    return gc.compress(model, recipe, data, seed=3, run_dir=folder)


def main() -> None:
    mode, folder, log, out = sys.argv[1], *map(Path, sys.argv[2:5])
    torch.set_num_threads(1)
    replace_the_clock()
    log_durable_acts(log)
    if os.environ.get("GRACILE_DIE_AT"):
        die_at(int(os.environ["GRACILE_DIE_AT"]))
    with log.open("a") as file:
        file.write('["begun"]\n')
    result = run(mode, folder)
    digest = run_directory.fingerprint_model(result.model)
    edits = sha256_json([edit_to_json(edit) for edit in result.edits])
    out.write_text(json.dumps({"weights": digest, "edits": edits, "met": result.met}))


if __name__ == "__main__":
    main()
