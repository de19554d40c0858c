"""Every layer in its own number of bits against one number for all, at the same bytes: how far outputs diverge.

    python -m benchmarks.mixed_precision resnet32|minilm [--uniform W4A8] [--solver nearest|GPTQ] [--seed 0]

ResNet-32: KL on test5k, 512 augmented training images calibrate. MiniLM: ‖y − y₀‖² / ‖y₀‖² of the sentence vectors of
the STS test, 256 training sentences calibrate; its embeddings are among the layers. The mixed model may take no more
bytes than the uniform one; its options are 2, 3, 4, 5, 6 and 8 bits, all with inputs of 8.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import gracile as gc
from benchmarks import sentences
from benchmarks.datasets import augment, cifar10
from benchmarks.models import accuracy, resnet32_akamaster
from gracile.data import Batch
from gracile.evaluate.size import state_bytes
from gracile.stats.match import divergence, relative_error

SCHEMES = {"W8A8": gc.W8A8} | {
    f"W{bits}A8": replace(gc.W8A8, name=f"W{bits}A8", weight=gc.Int(bits)) for bits in (6, 5, 4, 3, 2)
}
MID_RISE = {
    f"W{bits}A8 mid-rise": replace(gc.W8A8, name=f"W{bits}A8 mid-rise", weight=gc.formats.MidRise(bits))
    for bits in (6, 5, 4, 3, 2)
}


@dataclass(frozen=True)
class Task:
    """quality: the task's own metric, of a model. error: how far its outputs are from the original's."""

    model: nn.Module
    calibration: list[Batch]
    test: list[Batch]
    quality: Callable[[nn.Module], float]
    error: Callable[[list[Tensor], list[Tensor]], float]


def resnet32(seed: int) -> Task:
    """KL and accuracy on test5k."""
    images, _ = cifar10("train20k")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:512]
    torch.manual_seed(seed)
    test, answers = cifar10("test5k")
    calibration = list(augment(images[order]).split(64))
    batches = list(test.split(250))
    return Task(resnet32_akamaster(), calibration, batches, lambda m: accuracy(m, test, answers), divergence)


def minilm(seed: int) -> Task:
    """Relative squared error and Spearman's correlation on the STS test."""
    first, second, _ = sentences.sts("train")
    texts = [*first, *second]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:256].tolist()
    first, second, gold = sentences.sts("test")
    test = sentences.tokenize([*first, *second], 64)

    def spearman(model: nn.Module) -> float:
        found = sentences.similarities(torch.cat(_outputs(model, test))).double().numpy()
        return gc.metrics.Spearman().aggregate(np.stack([found, gold], axis=1))

    calibration = sentences.tokenize([texts[i] for i in order], 32)
    return Task(sentences.minilm(), calibration, test, spearman, relative_error)


@torch.no_grad()
def _outputs(model: nn.Module, test: list[Batch]) -> list[Tensor]:
    return [model(**batch) if isinstance(batch, dict) else model(batch) for batch in test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("resnet32", "minilm"))
    parser.add_argument("--uniform", choices=SCHEMES | MID_RISE, default="W4A8")
    parser.add_argument("--solver", choices=("nearest", "GPTQ"), default="nearest")
    parser.add_argument(
        "--mid-rise", action="store_true", help="grids without a zero, of 2 to 6 bits, among the options"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = {"resnet32": resnet32, "minilm": minilm}[args.task](args.seed)
    data, whole = gc.Data(calibration=task.calibration), state_bytes(task.model)
    reference = _outputs(task.model, task.test)
    print(json.dumps({"float": task.quality(task.model), "bytes": whole}), flush=True)
    solver = gc.solvers.GPTQ() if args.solver == "GPTQ" else None
    share, first = None, None
    for name in ("uniform", "mixed"):
        scheme = (SCHEMES | MID_RISE)[args.uniform] if share is None else None
        budget = None if share is None else gc.Bytes(share)
        options = () if share is None else tuple((SCHEMES | (MID_RISE if args.mid_rise else {})).values())
        start = time.perf_counter()
        result = gc.compress(
            task.model, gc.Quantize(scheme, to=budget, options=options, solver=solver), data, seed=args.seed
        )
        row = {"model": name, "seconds": round(time.perf_counter() - start)}
        share = share or state_bytes(result.model) / whole
        row["bytes"] = round(state_bytes(result.model) / whole, 4)
        row["error"] = found = task.error(_outputs(result.model, task.test), reference)
        first = first or found
        row |= {"of_uniform": round(found / first, 3), "quality": task.quality(result.model)}
        row["notes"] = [note for note in result.report.steps[0].notes if note.startswith(("Mixed", "Error"))]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
