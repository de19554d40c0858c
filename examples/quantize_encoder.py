"""Number formats of a transformer encoder: outliers of its inputs moved into the weights, and embeddings by the row.

Run: python examples/quantize_encoder.py [--data DIR]

Questions of TREC, answered by the encoder of examples/text_trec.py, which is trained once. 512 training questions
calibrate; the official test set judges.
"""

from __future__ import annotations

from common import accuracy, arguments
from text_trec import NEEDS, trained

import gracile as gc
from gracile.evaluate.size import state_bytes

STEPS = {
    "8 bits": gc.Quantize(gc.W8A8),
    "8 bits, SmoothQuant": gc.Quantize(gc.W8A8, ranges=gc.ranges.MinMax(), equalize=gc.equalize.SmoothQuant()),
    "4-bit weights, nearest": gc.Quantize(gc.W4A16(group=32)),
    "4-bit weights, GPTQ": gc.Quantize(gc.W4A16(group=32), solver=gc.solvers.GPTQ()),
    "2-bit weights, GPTQ": gc.Quantize(gc.Int(2, symmetric=False), solver=gc.solvers.GPTQ()),
}


def main() -> None:
    options = arguments(__doc__, NEEDS)
    model, (tokens, _), _, test = trained(options)
    data = gc.Data(calibration=list(tokens[:512].split(32)))
    print(f"{'original':24} accuracy {accuracy(model, test):.4f}")
    for name, step in STEPS.items():
        result = gc.compress(model, step, data)
        size = state_bytes(result.model) / state_bytes(model)
        print(f"{name:24} accuracy {accuracy(result.model, test):.4f}, {100 * size:.1f} % of the bytes")
        for row in result.report.steps[0].layers:
            if row.action == "skipped":
                print(f"  {row.name} stays as it is: {row.reason}")
    result.save(options.runs / "quantize_encoder" / "two_bits")


if __name__ == "__main__":
    main()
