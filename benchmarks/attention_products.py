"""Products of attention, queries with keys and weights with values, in 8-bit integers against floating point.

    python -m benchmarks.attention_products [--seconds 10] [--seed 0]

Scaled dot products alone, with no layer around them, so that what integers gain or cost is not hidden by the rest of
a block. Scales are per tensor, as kernels take them for two inputs, and wide enough for normal values. One thread,
files of each runtime, all of one shape timed in one run.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import gracile as gc
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.nn.ops import quantize_dequantize

#: Sentences, heads, tokens of a sentence, values of a head.
SHAPES = [(32, 12, 32, 32), (8, 12, 128, 32), (1, 12, 128, 32), (1, 12, 512, 64)]


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v, its factors rounded to 8 bits where `integers`."""

    def __init__(self, integers: bool) -> None:
        super().__init__()
        self.integers = integers

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.grid(q, 8.0) @ self.grid(k, 8.0).transpose(2, 3) * q.shape[-1] ** -0.5
        return self.grid(self.grid(scores.softmax(-1), 1.0, signed=False) @ self.grid(v, 8.0), 8.0)

    def grid(self, x: Tensor, width: float, *, signed: bool = True) -> Tensor:
        """The nearest of 256 values that `width` covers, around 0 or from 0 on."""
        if not self.integers:
            return x
        zero_point = torch.tensor(128 if signed else 0, dtype=torch.int16)
        rounded: Tensor = quantize_dequantize(x, torch.tensor(width / 255), zero_point, 0, 255)
        return rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    targets = {"ONNX Runtime": gc.OnnxRuntime(threads=1), "OpenVINO": gc.OpenVINO(threads=1)}
    for shape in SHAPES:
        batch = tuple(torch.randn(shape) for _ in "qkv")
        calls: dict[str, Any] = {}
        with TemporaryDirectory() as place:
            for (name, target), integers in product(targets.items(), (False, True)):
                path = Path(place) / f"{len(calls)}{target.suffix}"
                runner = target.load(target.export(Attention(integers).eval(), batch, path))
                calls[f"{name}, {'integers' if integers else 'float32'}"] = partial(runner, batch)
            times = measure_latency(calls, seconds=args.seconds, threads=1)
        row = {name: round(latency.p50_ms, 3) for name, latency in times.items()}
        print(json.dumps({"shape": shape} | row | {"instruction_set": instruction_set()}), flush=True)


if __name__ == "__main__":
    main()
