"""Number formats of a convolutional network: 8 bits, 4 bits chosen by a solver, and each layer its own within a budget.

Run: python examples/quantize_cnn.py [--data DIR]

ResNet-20 on CIFAR-10, without labels and without training: 512 training images calibrate, the test images judge.
"""

from __future__ import annotations

import torch
from common import accuracy, arguments, batches
from safetensors.torch import load_file
from vision_cifar10 import NEEDS, ResNet20, crop_and_flip, read

import gracile as gc
from gracile.evaluate.size import state_bytes

STEPS = {
    "8 bits": gc.Quantize(gc.W8A8),
    "4-bit weights, nearest": gc.Quantize(gc.W4A8),
    "4-bit weights, GPTQ": gc.Quantize(gc.W4A8, solver=gc.solvers.GPTQ()),
    "14 % of the bytes": gc.Quantize(to=gc.Bytes(0.14), options=(gc.W8A8, gc.W4A8, gc.W2A8), solver=gc.solvers.GPTQ()),
}


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model = ResNet20()
    model.load_state_dict(load_file(options.data / "cifar10/resnet20_akamaster.safetensors"))
    model.eval()
    images, _ = read(options.data / "cifar10/train20k.npz")
    test = batches(*read(options.data / "cifar10/test5k.npz"), 100)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:512]
    data = gc.Data(calibration=list(crop_and_flip(images[chosen], generator).split(64)))

    run = options.runs / "quantize_cnn"
    print(f"{'original':24} accuracy {accuracy(model, test):.4f}")
    for name, step in STEPS.items():
        result = gc.compress(model, step, data)
        size = state_bytes(result.model) / state_bytes(model)
        print(f"{name:24} accuracy {accuracy(result.model, test):.4f}, {100 * size:.1f} % of the bytes")
    result.save(run / "mixed")
    for row in result.report.steps[0].layers:
        if row.bits is not None:
            print(f"  {row.name:18} {row.bits:5.2f} bits per weight, relative error {row.error:.2g}")
    path = gc.OnnxRuntime().export(gc.compress(model, STEPS["8 bits"], data).model, images[:1], run / "w8a8.onnx")
    print(f"8 bits, for ONNX Runtime: {path}")


if __name__ == "__main__":
    main()
