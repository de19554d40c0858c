"""Convolutions before group norms in 8 bits: with a grid for their outputs, without, and in float32.

    python -m benchmarks.output_grids [--channels 64] [--seconds 2] [--seed 0]

Three convolutions with group norms and random weights, a batch of 16 images of 32 × 32. Latency as a share of the float
model's, both timed in turn; error: ‖y − y₀‖² / ‖y₀‖² of the outputs in PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gracile as gc
from gracile.environment import instruction_set
from gracile.evaluate.latency import measure_relative
from gracile.nn import QuantizedLayer
from gracile.stats.match import relative_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    width = args.channels
    model = nn.Sequential(*block(3, width), *block(width, width), *block(width, width), nn.Flatten(), nn.LazyLinear(10))
    images = torch.randn(16, 3, 32, 32)
    model.eval()(images)
    data = gc.Data(calibration=[torch.randn(16, 3, 32, 32) for _ in range(8)])
    with_grids = gc.compress(model, gc.Quantize(gc.W8A8), data, seed=args.seed).model
    without = copy.deepcopy(with_grids)
    for module in without.modules():
        if isinstance(module, QuantizedLayer):
            module.output_format = None
    print(json.dumps({"processor": instruction_set()}), flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wanted = model(images)
        for target in (gc.OnnxRuntime(), gc.OpenVINO()):
            reference = runner(target, model, images, Path(folder) / "float")
            for name, net in (("without output grids", without), ("with output grids", with_grids)):
                found = measure_relative(
                    reference, runner(target, net, images, Path(folder) / name), seconds=args.seconds
                )
                row: dict[str, Any] = {"target": target.name, "model": name, "share": round(found.share, 3)}
                row |= {"standard_error": round(found.error, 3), "float_ms": round(found.reference_ms, 2)}
                row["error"] = relative_error([net(images)], [wanted])
                print(json.dumps(row), flush=True)


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]


def runner(target: Any, model: nn.Module, images: torch.Tensor, path: Path) -> Callable[[], Any]:
    call = target.load(target.export(model, images, path.with_suffix(target.suffix)))
    return lambda: call(images)


if __name__ == "__main__":
    main()
