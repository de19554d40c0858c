"""MiniLM with inputs quantized as it runs: per token (ours), per tensor (ONNX Runtime's), and measured beforehand.

    python -m benchmarks.dynamic_inputs [--pairs 1379] [--seconds 20] [--seed 0]

ONNX files, one thread. Spearman on the STS benchmark's test pairs, 1 - cosine to the float model's vectors, and the
median time of a batch of 32 sentences of up to 32 tokens against float32, all in one run. Where the processor has no
int8 dot product, weights take 7 bits in all of them. 512 training sentences calibrate what is measured beforehand.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

import gracile as gc
from benchmarks import sentences
from benchmarks.int8_tasks import minilm
from gracile.environment import has_int8_dot_product, instruction_set
from gracile.evaluate.latency import measure_latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1379)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, target = minilm(args.seed), gc.OnnxRuntime(threads=1)
    data = gc.Data(calibration=task.calibration)
    wide = has_int8_dot_product()
    by_token = gc.formats.W8A8Dynamic if wide else gc.formats.W7A8Dynamic
    measured = gc.W8A8 if wide else gc.formats.W7A8
    smooth = {"ranges": gc.ranges.MinMax(), "equalize": gc.equalize.SmoothQuant()}
    steps: dict[str, tuple[gc.Quantize, gc.Data]] = {
        "per token, no data": (gc.Quantize(by_token), gc.Data()),
        "per token, smoothed": (gc.Quantize(by_token, **smooth), data),
        "measured, smoothed": (gc.Quantize(measured, **smooth), data),
    }
    first, second, gold = sentences.sts("test")
    first, second, gold = first[: args.pairs], second[: args.pairs], np.asarray(gold)[: args.pairs]
    test = sentences.tokenize([*first, *second], 32)
    with TemporaryDirectory() as place:
        files = {"float32": target.export(task.model, test[0], Path(place) / "float32.onnx")}
        for i, (name, (step, given)) in enumerate(steps.items()):
            model = gc.compress(task.model, step, given, seed=args.seed).model
            files[name] = target.export(model, test[0], Path(place) / f"{i}.onnx")
        theirs = Path(place) / "theirs.onnx"
        quantize_dynamic(files["float32"], theirs, weight_type=QuantType.QInt8, per_channel=True, reduce_range=not wide)
        files["per tensor, ONNX Runtime"] = theirs
        runners = {name: target.load(path) for name, path in files.items()}
        vectors = {name: torch.cat([runner(batch) for batch in test]) for name, runner in runners.items()}
        batch = test[0]
        calls: dict[str, Any] = {name: partial(runner, batch) for name, runner in runners.items()}
        times = measure_latency(calls, seconds=args.seconds, rounds=200, threads=1)
        for name, found in vectors.items():
            row = {"inputs": name, "spearman": spearman(found, gold), "distance": distance(found, vectors["float32"])}
            row |= {"file_bytes": files[name].stat().st_size, "p50_ms": round(times[name].p50_ms, 2)}
            faster = round(times["float32"].p50_ms / times[name].p50_ms, 3)
            print(json.dumps(row | {"faster": faster, "instruction_set": instruction_set()}), flush=True)


def spearman(vectors: Tensor, gold: Any) -> float:
    """Rank correlation of cosines with the gold scores, in per cent."""
    values = np.stack([sentences.similarities(vectors).double().numpy(), gold], axis=1)
    return round(100 * float(gc.metrics.Spearman().aggregate(values)), 2)


def distance(vectors: Tensor, wanted: Tensor) -> float:
    """Mean of 1 − cosine."""
    return round(float(1 - torch.nn.functional.cosine_similarity(vectors, wanted).mean()), 6)


if __name__ == "__main__":
    main()
