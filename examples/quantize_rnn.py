"""Number formats of a recurrent network: weights of a GRU per gate and unit, rounded along the sequence, and distilled.

Run: python examples/quantize_rnn.py [--data DIR]

Spoken digits, told apart by the network of examples/speech_digits.py, which is trained once. The official test set
judges.
"""

from __future__ import annotations

from common import accuracy, arguments, batches
from speech_digits import NEEDS, trained

import gracile as gc
from gracile.evaluate.size import state_bytes

TWO_BITS = gc.Quantize(gc.Int(2))
STEPS = {
    "8 bits": gc.Quantize(gc.W8A8),
    "4-bit weights": gc.Quantize(gc.Int(4)),
    "2-bit weights": TWO_BITS,
    "2-bit weights, GPTQ": gc.Quantize(gc.Int(2), solver=gc.solvers.GPTQ()),
    "2-bit weights, distilled": gc.Recipe(TWO_BITS, gc.Distill(epochs=5)),
}


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model, split = trained(options)
    test = batches(*split["test"], 50)
    data = gc.Data(train=batches(*split["train"], 32))
    print(f"{'original':24} accuracy {accuracy(model, test):.4f}")
    for name, step in STEPS.items():
        result = gc.compress(model, step, data)
        size = state_bytes(result.model) / state_bytes(model)
        print(f"{name:24} accuracy {accuracy(result.model, test):.4f}, {100 * size:.1f} % of the bytes")
    run = options.runs / "quantize_rnn"
    result.save(run / "two_bits")
    print(f"For ONNX Runtime: {gc.OnnxRuntime().export(result.model, split['test'][0][:1], run / 'two_bits.onnx')}")


if __name__ == "__main__":
    main()
