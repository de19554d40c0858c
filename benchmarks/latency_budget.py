"""A budget of latency met by measured widths, against uniform width at the same measured latency.

    python -m benchmarks.latency_budget resnet32|minilm|separable onnxruntime|openvino [--budget 0.5] [--layers]

Prunes to Latency(budget) by OBS, tables of loss and of latency, and least-squares refit (with --layers, of residual
blocks too); then by the same criterion and refit with every group cut by one fraction, which is bisected until the
model takes as long as ours did (plainly, and with widths rounded to multiples of 8). Where no uniform width is as fast,
one that takes 5 % longer is tried, and so on. Neither is trained, no labels are used, calibration never sees test data.
At the end all are timed in turn. separable: train it first with python -m benchmarks.separable.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import gracile as gc
from benchmarks import sentences
from benchmarks.datasets import cifar10
from benchmarks.models import accuracy, resnet32_akamaster
from benchmarks.separable import FILE, separable
from benchmarks.structured_sentences import by_length, spearman, training_sentences
from gracile.environment import describe_environment
from gracile.evaluate.latency import Latency, measure_latency


@dataclass(frozen=True)
class Case:
    """A model with what it is cut and judged by; quality in percent. example: the batch that is timed."""

    model: nn.Module
    data: gc.Data
    example: Any
    quality: Callable[[nn.Module], float]
    heads: bool = False
    table_examples: int = 256


def images(model: nn.Module, batch: int, calibration: int, seed: int) -> Case:
    """A CIFAR-10 classifier."""
    train, _ = cifar10("train20k")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:calibration]
    batches = list(train[chosen].split(batch))
    test, labels = cifar10("test5k")
    return Case(model, gc.Data(calibration=batches), batches[0], lambda net: accuracy(net, test, labels))


def texts(batch: int, calibration: int, seed: int) -> Case:
    """The sentence encoder, its batches of equal length; the first, which is timed, is a whole one."""
    batches = by_length(training_sentences(seed)[:calibration], batch, seed)
    first = next(
        i for i, one in enumerate(batches) if len(one["input_ids"]) == batch and one["input_ids"].shape[1] > 10
    )
    batches.insert(0, batches.pop(first))
    data = gc.Data(calibration=batches)
    return Case(sentences.minilm(), data, batches[0], spearman, heads=True, table_examples=128)


def prune(
    case: Case, budget: gc.Latency, allocation: Any, multiple_of: int = 1, layers: tuple[gc.Layers, ...] = ()
) -> gc.Prune:
    channels = gc.Channels(multiple_of=multiple_of)
    return gc.Prune(
        to=budget,
        criterion=gc.criteria.OBS(),
        pattern=(channels, *((gc.Heads(),) if case.heads else ()), *layers),
        allocation=allocation,
        repair=gc.solvers.LeastSquares(),
    )


def time_all(models: dict[str, nn.Module], case: Case, target: Any, seconds: float) -> dict[str, Latency]:
    """All models exported, and timed in turn."""
    with TemporaryDirectory() as folder:
        runners: dict[str, Callable[[], Any]] = {}
        for i, (name, model) in enumerate(models.items()):
            runner = target.load(target.export(model, case.example, Path(folder) / f"{i}{target.suffix}"))
            runners[name] = lambda runner=runner: runner(case.example)
        return measure_latency(runners, seconds=seconds, rounds=10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("resnet32", "minilm", "separable"))
    parser.add_argument("target", choices=("onnxruntime", "openvino"))
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="of the allocation; 3, for minilm 0")
    parser.add_argument("--calibration", type=int, default=None, help="images (1024) or sentences (3000)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing at the end")
    parser.add_argument("--file", type=Path, default=FILE, help="of the separable net")
    parser.add_argument("--layers", action="store_true", help="residual blocks may go too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model == "minilm":
        case = texts(args.batch, args.calibration or 3000, args.seed)
    else:
        model = resnet32_akamaster() if args.model == "resnet32" else separable(args.file)
        case = images(model, args.batch, args.calibration or 1024, args.seed)
    rounds = args.rounds if args.rounds is not None else 0 if case.heads else 3
    target = (gc.OnnxRuntime if args.target == "onnxruntime" else gc.OpenVINO)(threads=args.threads)
    about = describe_environment()
    settings = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(args).items()}
    machine = {name: about[name] for name in ("cpu", "instruction_set", "torch", "packages")}
    print(json.dumps(settings | machine | {"quality": case.quality(case.model)}), flush=True)

    models, records = {"original": case.model}, {}

    def run(name: str, step: gc.Prune) -> None:
        start = time.perf_counter()
        result = gc.compress(case.model, step, case.data, seed=args.seed)
        models[name] = result.model
        record = records[name] = result.report.steps[0]
        row = {"variant": name, "quality": case.quality(result.model), "seconds": time.perf_counter() - start}
        numbers = {key: value for key, value in record.numbers.items() if "latency" in key}
        kept = {r.name: f"{r.kept}/{r.of}" for r in record.layers if r.action == "cut"}
        print(json.dumps(row | numbers | {"notes": record.notes, "kept": kept}), flush=True)

    tables = gc.allocate.MeasuredLoss(examples=case.table_examples, rounds=rounds)
    layers = (gc.Layers(),) if args.layers else ()
    run("measured", prune(case, gc.Latency(args.budget, target=target), tables, layers=layers))
    reached = 1 / time_all(models, case, target, args.seconds / 3)["measured"].ratio
    for name, multiple_of in (("uniform", 1), ("uniform in eights", 8)):
        allowed = reached
        while name not in models and allowed < 1:
            budget = gc.Latency(allowed, target=target)
            try:
                run(name, prune(case, budget, gc.allocate.Uniform(), multiple_of))
            except gc.ConfigError as error:
                print(json.dumps({"variant": name, "not reached": allowed, "error": str(error)}), flush=True)
                allowed *= 1.05
    for name, latency in time_all(models, case, target, args.seconds).items():
        share = {"share": 1 / latency.ratio, "low": 1 / latency.ratio_high, "high": 1 / latency.ratio_low}
        row = {"variant": name, "p50_ms": latency.p50_ms, "p95_ms": latency.p95_ms, "samples": latency.samples}
        print(json.dumps(row | share | {"of_budget": share["share"] / args.budget}), flush=True)


if __name__ == "__main__":
    main()
