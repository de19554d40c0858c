"""A small language model narrower and shallower: perplexity without training, and after distillation.

    python -m benchmarks.stories [--fractions 0.1 0.2] [--windows 128] [--rounds 3] [--layer] [--epochs 6] [--baselines]

stories260k (a Llama of five layers, tied embeddings) on TinyStories. Counted are the parameters of the five blocks
(227,200); the embedding of 32,768 stays whole, and so does the final norm. A fraction of 0.2 takes out heads (a query
head of each group, or a key-value head with its queries) and hidden units of the gated perceptrons until at most
80 % of the blocks' parameters are left. Calibration and training: windows of the training stories. Perplexity on the
test stories in windows of 512 tokens, the first token of each unscored; choices inside the package see no test token.

--layer takes out one of the five blocks instead; --epochs distils what the last fraction left, by soft labels of the
original; --baselines adds magnitude, with the same refit and without.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import gracile as gc
from benchmarks.models import SHARED

FOLDER = SHARED / "stories260k"
#: Channels of the stream are not among what is removed: they are the embedding's, which stays whole.
EXCLUDED = ("lm.model.embed_tokens",)


class Positions(nn.Module):
    """The language model with logits as [windows · tokens, vocabulary], so that losses are KL at each position."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, 1)


@dataclass(frozen=True)
class Setting:
    """What is said of a model: perplexity on the test stories, and its blocks' parameters."""

    model: nn.Module
    perplexity: float
    parameters: int

    def compare(self, model: nn.Module) -> dict[str, float]:
        found = perplexity(model)
        return {
            "removed": round(1 - block_parameters(model) / self.parameters, 4),
            "perplexity": round(found, 4),
            "ratio": round(found / self.perplexity, 4),
        }


def stories() -> nn.Module:
    """The model with its published weights."""
    return Positions(transformers.LlamaForCausalLM.from_pretrained(FOLDER)).eval()


def windows(split: str, length: int) -> Tensor:
    """Consecutive windows [n, length] of the token stream "calibration", "validation" or "test"."""
    with np.load(FOLDER / "tinystories_tokens.npz") as archive:
        tokens = torch.from_numpy(archive[split].astype(np.int64))
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, split: str = "test") -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each window of 512."""
    total, count = 0.0, 0
    for ids in windows(split, 512).split(16):
        total += float(next_token_loss(model(ids).double(), ids, reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def next_token_loss(outputs: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each token but the first. outputs: [windows · tokens, vocabulary]; ids: [windows, tokens]."""
    logits = outputs.view(*ids.shape, -1)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def block_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def width(model: nn.Module, fraction: float, args: argparse.Namespace, criterion: str = "obs") -> gc.Prune:
    """Heads and hidden units until so much of the blocks' parameters is gone: an absolute number of all parameters."""
    left = sum(p.numel() for p in model.parameters()) - fraction * block_parameters(model)
    obs = criterion == "obs"
    measured = gc.allocate.MeasuredLoss(power=args.power, examples=args.table_windows, rounds=args.rounds)
    return gc.Prune(
        to=gc.Parameters(left),
        criterion=gc.criteria.OBS() if obs else gc.criteria.Magnitude(),
        pattern=(gc.Channels(), gc.Heads()),
        allocation=measured if obs else None,
        repair=None if criterion == "magnitude" else gc.solvers.LeastSquares(),
        exclude=EXCLUDED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.1, 0.2])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--table-windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--hints", action="store_true", help="the states behind every block, beside the soft labels")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = stories()
    dense = Setting(model, perplexity(model), block_parameters(model))
    print(json.dumps({"dense": dense.perplexity, "block_parameters": dense.parameters}), flush=True)
    everything = windows("calibration", args.length)
    shuffled = everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(args.seed))]
    loader = DataLoader(list(everything), batch_size=16, shuffle=True)
    data = gc.Data(calibration=list(shuffled[: args.windows].split(8)), train=loader)
    steps: list[tuple[str, gc.Prune]] = []
    for fraction in args.fractions:
        names = ["obs", "magnitude_refit", "magnitude"] if args.baselines else ["obs"]
        steps += [(f"{fraction:.0%} {name}", width(model, fraction, args, name)) for name in names]
    if args.layer:
        layers = gc.Layers(examples=args.table_windows, candidates=5)
        steps.append(("one layer", gc.Prune(0.2, pattern=layers, repair=gc.solvers.LeastSquares())))
    narrow = model
    for name, step in steps:
        start = time.perf_counter()
        result = gc.compress(model, step, data, seed=args.seed)
        record = result.report.steps[0]
        row: dict[str, object] = {"step": name, **dense.compare(result.model)}
        row["seconds"] = round(time.perf_counter() - start)
        row["kept"] = {r.name: f"{r.kept}/{r.of}" for r in record.layers if r.action == "cut"}
        row["removed_layers"] = [r.name for r in record.layers if r.action == "removed"]
        row["notes"] = [note for note in record.notes if "by start and round" in note or "after repair" in note]
        print(json.dumps(row), flush=True)
        narrow = result.model if name.endswith("obs") else narrow
    if args.epochs:
        start = time.perf_counter()
        distil = gc.Distill(
            losses=(gc.losses.SoftLabels(temperature=1.0), *([gc.losses.Hint()] if args.hints else [])),
            epochs=args.epochs,
            optimizer=gc.steps.AdamW(learning_rate=args.learning_rate, weight_decay=0.0),
        )
        trained = gc.compress(narrow, distil, data, teacher=model, seed=args.seed).model
        row = {"step": f"{args.epochs} epochs of distillation", **dense.compare(trained)}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
