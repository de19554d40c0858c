"""Seconds and memory of cutting a transformer of about 100 million parameters: trace, plan, proof, cut and correction.

    python -m benchmarks.cut_cost [--model bert] [--fraction 0.25] [--repair] [--batch 4] [--length 32]

Random weights, so that nothing has to be downloaded; a process of its own. Memory is the highest resident set over what
was resident with the model loaded and run once, as a multiple of the bytes of the model.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers
from torch import nn

import gracile as gc
from benchmarks.memory import peak_bytes, restart_peak
from gracile.evaluate.size import state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bert", "gpt2"), default="bert")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--repair", action="store_true", help="least squares")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.model).eval()
    ids = [torch.randint(1000, (args.batch, args.length)) for _ in range(4)]
    data = gc.Data(calibration=[{"input_ids": each} for each in ids])
    with torch.no_grad():
        data.forward(model, {"input_ids": ids[0]})
    repair = gc.solvers.LeastSquares() if args.repair else None
    step = gc.Prune(args.fraction, pattern=gc.Channels(), repair=repair)
    size = state_bytes(model)
    before = restart_peak()
    start = time.perf_counter()
    result = gc.compress(model, step, data)
    seconds = time.perf_counter() - start
    row = {
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "repair": args.repair,
        "seconds": round(seconds, 1),
        "model_mb": round(size / 2**20),
        "result_mb": round(state_bytes(result.model) / 2**20),
        "peak_over_loaded_mb": round((peak_bytes() - before) / 2**20),
        "peak_over_loaded": round((peak_bytes() - before) / size, 2),
    }
    print(json.dumps(row))


def build(name: str) -> nn.Module:
    """The architecture at its published size, with random weights."""
    if name == "gpt2":
        config = transformers.GPT2Config()
        return transformers.GPT2LMHeadModel(config)
    return transformers.BertModel(transformers.BertConfig())


if __name__ == "__main__":
    main()
