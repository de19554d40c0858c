"""Range methods on a net: how far the outputs of a quantized ResNet-20 diverge on images that did not calibrate.

    python -m benchmarks.ranges [--schemes W8A8 W4A4] [--seed 0]

`resnet20_akamaster`; 1,024 images of train20k calibrate, KL is measured on 1,024 others of them.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch.nn.functional import kl_div, log_softmax

import gracile as gc
from benchmarks.datasets import cifar10
from benchmarks.models import resnet20_akamaster
from gracile import ranges

METHODS: tuple[ranges.Range, ...] = (ranges.MinMax(), ranges.MSE(), ranges.Percentile(), ranges.Automatic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A4"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, (images, _) = resnet20_akamaster(), cifar10("train20k")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    data, judged = gc.Data(calibration=list(images[order[:1024]].split(128))), images[order[1024:2048]]
    with torch.no_grad():
        wanted = log_softmax(model(judged), dim=1)
    for name in args.schemes:
        for method in METHODS:
            start = time.perf_counter()
            step = gc.Quantize(getattr(gc.formats, name), ranges=method)
            result = gc.compress(model, step, data, seed=args.seed)
            seconds = round(time.perf_counter() - start)
            with torch.no_grad():
                found = log_softmax(result.model(judged), dim=1)
            kl = float(kl_div(found, wanted, reduction="batchmean", log_target=True))
            row = {"scheme": name, "ranges": type(method).__name__, "kl": round(kl, 6), "seconds": seconds}
            print(json.dumps(row | {"notes": result.report.steps[0].notes[:1]}), flush=True)


if __name__ == "__main__":
    main()
