"""MiniLM narrower without retraining: heads and neurons cut to a share of the multiply-accumulates, by OBS and refit.

    python -m benchmarks.structured_sentences [--ratios 1.5 2 3 4] [--sentences 3000] [--epochs 3] [--time]

Training sentences of STS-B calibrate, those that also stand in the test split left out, batched by their exact number
of tokens; 400 others of them give the mean cosine loss, and the test pairs Spearman. --epochs: of distillation from the
original after each cut, by hidden states and cosine distance on the training sentences but those 400. --time only times
what the folder holds, ONNX Runtime in float32, batch 32 of 32 tokens, every model in one run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks import sentences
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.graph import trace
from gracile.steps import AdamW

Batches = list[dict[str, Tensor]]


def training_sentences(seed: int) -> list[str]:
    """Distinct training sentences in random order, without any of the test split."""
    first, second, _ = sentences.sts("train")
    test = {text for half in sentences.sts("test")[:2] for text in half}
    texts = sorted({*first, *second} - test)
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def by_length(texts: list[str], size: int, seed: int) -> Batches:
    """Batches of at most `size` sentences with equal numbers of tokens, in random order; no token is padding."""
    buckets: dict[int, list[dict[str, Tensor]]] = {}
    for one in sentences.tokenize(texts, 1):
        length = int(one["attention_mask"].sum())
        buckets.setdefault(length, []).append({name: ids[:, :length] for name, ids in one.items()})
    batches = [
        {name: torch.cat([one[name] for one in bucket[i : i + size]]) for name in bucket[0]}
        for bucket in buckets.values()
        for i in range(0, len(bucket), size)
    ]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return [batches[i] for i in order]


@torch.no_grad()
def cosine_loss(model: nn.Module, original: nn.Module, batches: Batches) -> float:
    """Mean of 1 − cosine between the vectors of both models."""
    losses = [1 - (model(**batch) * original(**batch)).sum(1) for batch in batches]
    return float(torch.cat(losses).mean())


@torch.no_grad()
def spearman(model: nn.Module) -> float:
    """Of cosines and gold similarities on the test pairs, in percent."""
    first, second, gold = sentences.sts("test")
    vectors = torch.cat([model(**batch) for batch in sentences.tokenize([*first, *second], 64)])
    found = sentences.similarities(vectors).double().numpy()
    return 100 * float(gc.metrics.Spearman().aggregate(np.stack([found, gold], axis=1)))


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one sentence of 32 tokens."""
    batch = sentences.tokenize(["word " * 40], 1, 32)[0]
    return int(trace(model, lambda net: net(**batch)).macs)


def latencies(folder: Path) -> None:
    """Time every model of the folder on ONNX Runtime, round by round."""
    target, batch = gc.OnnxRuntime(), sentences.tokenize(["word " * 40] * 32, 32, 32)[0]
    runners: dict[str, Any] = {}
    for path in sorted(folder.glob("*.onnx")):
        runner = target.load(path)
        runners[path.stem] = lambda runner=runner: runner(batch)
    measured = measure_latency(runners, seconds=60.0)
    dense = measured["dense"].p50_ms
    rows = {name: {"p50_ms": m.p50_ms, "faster": dense / m.p50_ms} for name, m in measured.items()}
    print(json.dumps({"instruction_set": instruction_set(), "latency": rows}))


def judged(model: nn.Module, original: nn.Module, held_out: Batches) -> dict[str, float]:
    """How much smaller and how good it is."""
    ratio = macs(original) / macs(model)
    return {"ratio": ratio, "spearman": spearman(model), "cosine_loss": cosine_loss(model, original, held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--sentences", type=int, default=3000)
    parser.add_argument("--table-sentences", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--power", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    if args.time:
        latencies(args.folder)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    model = sentences.minilm()
    texts = training_sentences(args.seed)
    held_out = by_length(texts[-400:], 64, args.seed)
    data = gc.Data(calibration=by_length(texts[: args.sentences], 32, args.seed))
    training = gc.Data(train=by_length(texts[:-400], 32, args.seed))
    example = sentences.tokenize(texts[:2], 2, 32)[0]
    gc.OnnxRuntime().export(model, example, args.folder / "dense.onnx")
    print(json.dumps({"model": "minilm", "spearman": spearman(model), "macs": macs(model)}), flush=True)
    for ratio in args.ratios:
        start = time.perf_counter()
        step = gc.Prune(
            to=gc.MACs(1 / ratio),
            criterion=gc.criteria.OBS(),
            pattern=(gc.Channels(multiple_of=16), gc.Heads()),
            allocation=gc.allocate.MeasuredLoss(power=args.power, examples=args.table_sentences, rounds=args.rounds),
            repair=gc.solvers.LeastSquares(),
        )
        result = gc.compress(model, step, data, seed=args.seed)
        seconds = time.perf_counter() - start
        kept = {r.name: f"{r.kept}/{r.of}" for r in result.report.steps[0].layers if r.action == "cut"}
        print(json.dumps(judged(result.model, model, held_out) | {"seconds": seconds, "kept": kept}), flush=True)
        gc.OnnxRuntime().export(result.model, example, args.folder / f"macs_{ratio:g}.onnx")
        if args.epochs:
            start = time.perf_counter()
            distil = gc.Distill(
                losses=(gc.losses.Hint(), gc.losses.CosineDistance()),
                epochs=args.epochs,
                optimizer=AdamW(args.learning_rate),
                mixed_precision=True,
            )
            result = gc.compress(result.model, distil, training, teacher=model, seed=args.seed)
            seconds = time.perf_counter() - start
            row = {"epochs": args.epochs, "seconds": seconds} | dict(result.report.steps[-1].numbers)
            print(json.dumps(judged(result.model, model, held_out) | row), flush=True)


if __name__ == "__main__":
    main()
