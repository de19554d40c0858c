"""Number formats of a language model: weights alone in 4 bits, in groups that runtimes multiply with as they are.

Run: python examples/quantize_lm.py [--data DIR]

A Llama of five layers that tells stories (stories260K of Andrej Karpathy's llama2.c). Windows of its training stories
calibrate; other stories judge.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from common import arguments
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import gracile as gc
from gracile.evaluate.size import state_bytes

STORIES = "https://huggingface.co/karpathy/tinyllamas, stories260K: "
NEEDS = {
    "stories260k/model.safetensors": STORIES + "its weights as transformers' LlamaForCausalLM has them, with config",
    "stories260k/tinystories_tokens.npz": "TinyStories in its tokens, streams named calibration, validation and test",
}
KEPT = ("lm.model.embed_tokens", "lm.lm_head")  # one and the same table: it stays as it is
FOUR_BITS = gc.W4A16(group=32)
STEPS = {
    "4 bits, nearest": gc.Quantize(FOUR_BITS, exclude=KEPT),
    "4 bits, AWQ": gc.Quantize(FOUR_BITS, equalize=gc.equalize.AWQ(), exclude=KEPT),
    "4 bits, GPTQ": gc.Quantize(FOUR_BITS, solver=gc.solvers.GPTQ(), exclude=KEPT),
    "4 bits, AWQ and GPTQ": gc.Quantize(FOUR_BITS, equalize=gc.equalize.AWQ(), solver=gc.solvers.GPTQ(), exclude=KEPT),
}


class Logits(nn.Module):
    """Logits [tokens, vocabulary] of token numbers [windows, length]."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(input_ids=ids, use_cache=False).logits.flatten(0, 1)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    losses = [F.cross_entropy(model(window[None])[:-1], window[1:]) for window in windows]
    return math.exp(torch.stack(losses).mean().item())


def main() -> None:
    options = arguments(__doc__, NEEDS)
    folder = options.data / "stories260k"
    model = Logits(LlamaForCausalLM.from_pretrained(folder)).eval()
    with np.load(folder / "tinystories_tokens.npz", allow_pickle=False) as file:
        streams = {name: torch.from_numpy(file[name].astype(np.int64)) for name in ("calibration", "test")}
    calibration = streams["calibration"][: 64 * 256].view(-1, 16, 256)
    test = streams["test"][: 32 * 512].view(32, 512)
    data = gc.Data(calibration=list(calibration))

    print(f"{'original':24} perplexity {perplexity(model, test):.4f}")
    for name, step in STEPS.items():
        result = gc.compress(model, step, data)
        size = state_bytes(result.model) / state_bytes(model)
        print(f"{name:24} perplexity {perplexity(result.model, test):.4f}, {100 * size:.1f} % of the bytes")
    run = options.runs / "quantize_lm"
    result.save(run / "four_bits")
    path = gc.OnnxRuntime().export(result.model, test[:1, :8], run / "four_bits.onnx")
    print(f"For ONNX Runtime: {path}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
