"""What the examples share: arguments, finding the data, training once, and showing progress."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

Batches = list[tuple[Tensor, Tensor]]
ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str, needs: Mapping[str, str]) -> argparse.Namespace:
    """`data` and `runs`, the folders to read from and to write to; ends with exit code 2 where data are missing.

    needs: path of each file inside the data folder -> what it holds and where it is to be had.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("GRACILE_SHARED") or ROOT.parent / "shared" / "data"),
        help="folder with the data sets (default: $GRACILE_SHARED or ../shared/data)",
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder for weights and reports")
    options = parser.parse_args()
    missing = {name: source for name, source in needs.items() if not (options.data / name).is_file()}
    if missing:
        lines = [f"  {options.data / name}\n    {source}" for name, source in missing.items()]
        print("This example needs data that are not there:", *lines, sep="\n", file=sys.stderr)
        print("Put them there, or name another folder with --data DIR.", file=sys.stderr)
        raise SystemExit(2)
    return options


def train_once(model: nn.Module, weights: Path, train: Callable[[nn.Module], None]) -> nn.Module:
    """The model in eval mode, trained by `train` in the first run and with the weights it kept in later ones."""
    if weights.is_file():
        model.load_state_dict(load_file(weights))
        print(f"Trained weights: {weights} (delete the file to train again)")
    else:
        start = time.perf_counter()
        train(model)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), weights)
        print(f"Trained in {time.perf_counter() - start:.0f} s; weights kept in {weights}")
    return model.eval()


def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 64,
    weight_decay: float = 0.01,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:
    """Train a classifier in place: cross-entropy, AdamW, a one-cycle learning rate, a new order in every epoch."""
    generator = torch.Generator().manual_seed(0)
    steps = -(-len(inputs) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(inputs), generator=generator).split(batch_size):
            batch = inputs[index] if augment is None else augment(inputs[index], generator)
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"  epoch {epoch + 1} of {epochs}: loss {total / steps:.3f}", flush=True)


def batches(inputs: Tensor, labels: Tensor, size: int) -> Batches:
    """Consecutive batches (inputs, labels); the last may be smaller."""
    return list(zip(inputs.split(size), labels.split(size)))


@torch.no_grad()
def logits_of(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all examples."""
    pairs = [(model(inputs), labels) for inputs, labels in data]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def accuracy(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of examples whose largest logit is the label's."""
    logits, labels = logits_of(model, data)
    return (logits.argmax(1) == labels).double().mean().item()


def show(progress: object) -> None:
    """One line on the terminal that tells how far a phase is."""
    total = getattr(progress, "total", None)
    of = f"/{total}" if total else ""
    line = f"  {getattr(progress, 'phase', '')} {getattr(progress, 'done', '')}{of} {getattr(progress, 'note', '')}"
    if sys.stderr.isatty():
        print(f"\r{line[:110]:<110}", end="", file=sys.stderr, flush=True)
