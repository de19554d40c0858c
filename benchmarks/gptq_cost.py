"""Seconds and loss of rounding one layer: ours against the algorithm of the GPTQ paper, the same moments and threads.

    python -m benchmarks.gptq_cost [--rows 1024] [--columns 4096] [--bits 4] [--threads 2] [--repeats 3]

The published algorithm is written here as in its reference code: the Hessian damped by 1 % of its mean diagonal and
sorted by it, its inverse and the Cholesky factor of that, columns in blocks of 128, min-max scales per row. Both get
the weight and H = x xᵀ of inputs that go together. "nearest plane" is the same sweep from the factor of H itself;
"polished" adds one sweep of coordinate descent over codes and scales.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import gracile as gc
from gracile.environment import instruction_set
from gracile.formats import PerChannel
from gracile.solvers.rounding import RoundingProblem
from gracile.steps.quantization.grids import IntGrid


def published(weight: Tensor, hessian: Tensor, bits: int, block: int = 128) -> Tensor:
    """The weight rounded by Algorithm 1 of arXiv:2210.17323 with activation order."""
    rows, columns = weight.shape
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / top
    order = hessian.diagonal().argsort(descending=True)
    w, h = weight[:, order].clone(), hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    found = torch.zeros_like(w)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = w[:, start:stop].clone(), torch.zeros(rows, stop - start)
        inside = upper[start:stop, start:stop]
        for i in range(stop - start):
            column = part[:, i]
            q = torch.clamp(torch.round(column.unsqueeze(1) / scale), -top - 1, top).mul(scale).flatten()
            found[:, start + i] = q
            error = (column - q) / inside[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(inside[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return found[:, order.argsort()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    mixing = torch.eye(args.columns) + torch.randn(args.columns, args.columns, generator=generator) / args.columns**0.5
    x = torch.randn(2 * args.columns, args.columns, generator=generator) @ mixing
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(args.columns)
    weight = torch.randn(args.rows, args.columns, generator=generator)
    problem = RoundingProblem(weight, hessian)
    grid = IntGrid(gc.Int(args.bits, PerChannel(0)), gc.ranges.MinMax())
    plain = gc.solvers.GPTQ(beam=1, polish=0, rounds=1)
    polished = gc.solvers.GPTQ(beam=1, polish=1, rounds=1)
    variants: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published(weight, hessian, args.bits),
        "nearest plane": lambda: plain(weight, problem, grid).weight,
        "polished": lambda: polished(weight, problem, grid).weight,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            found = run()
            seconds[name].append(time.perf_counter() - start)
            losses[name] = float(problem.loss(found).sum())
    print(json.dumps({"threads": args.threads, "instructions": instruction_set(), "shape": [args.rows, args.columns]}))
    for name in variants:
        ratio = statistics.median(seconds["published"]) / statistics.median(seconds[name])
        row = {"variant": name, "seconds": [round(s, 2) for s in seconds[name]], "faster": round(ratio, 2)}
        print(json.dumps(row | {"loss": losses[name] / losses["published"]}))


if __name__ == "__main__":
    main()
