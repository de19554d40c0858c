"""A small language model in few bits without training: how much of the perplexity lost by rounding is won back.

    python -m benchmarks.language_rounding [--cases w4g32 w3g32 w3row w2g32] [--windows 128] [--variants ...] [--seed 0]
    python -m benchmarks.language_rounding --epochs 3 --variants "nearest by min-max" GPTQ
    python -m benchmarks.language_rounding --symmetric --variants "nearest by min-max" nearest GPTQ

stories260k, all linear layers of its blocks on asymmetric grids, or on symmetric ones, which have no zero points; the
tied embedding stays float. Calibration: windows of --length tokens of the training stories. Perplexity on the test
stories in windows of 512; share = (nearest by min-max − found) / (nearest by min-max − float). "published GPTQ" is the
algorithm of arXiv:2210.17323 with its clipping of the grid and activation order, on the same moments. --epochs tunes
codes, scales, norms and biases of each variant but the first end to end afterwards, by soft labels of the float model
on the training stories and, to the share --label-weight, by the stories' own next tokens. HQQ is what its own optimizer
does at its defaults, with zero points in float32 (`pip install --no-deps --no-build-isolation hqq termcolor`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import DataLoader

import gracile as gc
from benchmarks.stories import next_token_loss, perplexity, stories, windows
from gracile.formats import PerChannel, PerGroup

CASES = {
    "w4g32": gc.Int(4, PerGroup(32), symmetric=False),
    "w3g32": gc.Int(3, PerGroup(32), symmetric=False),
    "w3row": gc.Int(3, PerChannel(0), symmetric=False),
    "w2g32": gc.Int(2, PerGroup(32), symmetric=False),
}
EXCLUDED = ("lm.model.embed_tokens", "lm.lm_head")
PUBLISHED = gc.solvers.GPTQ(beam=1, polish=0, rounds=1, asymmetry=0.0)
VARIANTS = {
    "nearest by min-max": {"ranges": gc.ranges.MinMax()},
    "nearest": {},
    "published GPTQ": {"solver": PUBLISHED, "ranges": gc.ranges.MSE(thresholds=100, power=2.4)},
    "GPTQ, symmetric target": {"solver": gc.solvers.GPTQ(asymmetry=0.0)},
    "GPTQ, one round, beam of one": {"solver": gc.solvers.GPTQ(beam=1, rounds=1)},
    "GPTQ": {"solver": gc.solvers.GPTQ()},
    "AWQ": {"equalize": gc.equalize.AWQ()},
    "AWQ and GPTQ": {"equalize": gc.equalize.AWQ(), "solver": gc.solvers.GPTQ()},
    "AdaRound": {"solver": gc.solvers.AdaRound()},
}


#: The peer that is not a setting of `Quantize`.
HQQ = "HQQ"


@torch.no_grad()
def by_hqq(model: nn.Module, fmt: gc.Int) -> nn.Module:
    """A copy whose linear layers, but the head, hold what HQQ makes of them on the same groups."""
    from hqq.core.optimize import optimize_weights_proximal_legacy

    changed, top = copy.deepcopy(model), 2**fmt.bits - 1
    for name, layer in changed.named_modules():
        if not isinstance(layer, nn.Linear) or name in EXCLUDED:
            continue
        size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else layer.in_features
        parts = []
        for rows in layer.weight.split(size, dim=1):
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            scale = (top / (high - low)).clamp(max=2e4)
            codes, scale, zero = optimize_weights_proximal_legacy(rows, scale, -low * scale, [0, top], axis=1)
            parts.append((codes - zero) / scale)
        layer.weight.copy_(torch.cat(parts, dim=1))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, HQQ], default=list(VARIANTS))
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window of calibration and training")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--label-weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = stories()
    pool = windows("calibration", args.length)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(args.seed))[: args.windows]
    batch = 4096 // args.length
    loader = DataLoader(list(pool), batch_size=batch, shuffle=True)
    data = gc.Data(calibration=list(pool[order].split(batch)), train=loader, loss=next_token_loss)
    whole = perplexity(model)
    print(json.dumps({"float": whole}), flush=True)
    for case in args.cases:
        worst, fmt = None, replace(CASES[case], symmetric=args.symmetric)
        for name in args.variants:
            start = time.perf_counter()
            tuned = args.epochs > 0 and worst is not None and name != HQQ
            if name == HQQ:
                rounded, notes = by_hqq(model, fmt), []
            else:
                step: gc.Step = gc.Quantize(fmt, exclude=EXCLUDED, **VARIANTS[name])
                step = gc.Recipe(step, distillation(args)) if tuned else step
                result = gc.compress(model, step, data, seed=args.seed)
                rounded, notes = result.model, result.report.steps[0].notes[:1]
            row = {
                "case": case,
                "symmetric": args.symmetric,
                "variant": name,
                "tuned": tuned,
                "seconds": round(time.perf_counter() - start, 1),
            }
            row["perplexity"] = found = perplexity(rounded)
            worst = found if worst is None else worst
            row["share"] = round((worst - found) / (worst - whole), 3)
            print(json.dumps(row | {"notes": notes}), flush=True)


def distillation(args: argparse.Namespace) -> gc.Distill:
    """By soft labels and, where the user wants it, the tokens themselves."""
    return gc.Distill(
        losses=(gc.SoftLabels(temperature=1.0),),
        epochs=args.epochs,
        label_weight=args.label_weight,
        optimizer=gc.steps.AdamW(args.learning_rate, weight_decay=0.0),
    )


if __name__ == "__main__":
    main()
