"""A report made by hand, as `optimize` would hand it over for a small vision model."""

from __future__ import annotations

import random

import pytest

from gracile.report import Candidate, LayerRow, Measurement, Report, StepRecord
from gracile.surgery import Resize, Swap


def measurement(label, target, precision, batch, p50, quality, **more):
    shared = {
        "quality": {"value": quality, "low": quality - 0.008, "high": quality + 0.008, "examples": 5000,
                    "name": "accuracy"},
        "latency_p95_ms": round(p50 * 1.12, 4),
        "threads": 2,
        "instruction_set": "avx2",
    }  # fmt: skip
    return Measurement(label=label, target=target, precision=precision, batch_size=batch, latency_p50_ms=p50,
                       **{**shared, **more})  # fmt: skip


def timings(median, seed):
    generator = random.Random(seed)
    return tuple(round(median * generator.lognormvariate(0, 0.06), 4) for _ in range(200))


def layer_names():
    return [f"layer{stage}.{block}.conv{i}" for stage in (1, 2, 3) for block in (0, 1, 2) for i in (1, 2)]


def make_steps():
    names = layer_names()
    cut, quantized = [], []
    for i, name in enumerate(names):
        width = 16 * 2 ** (i // 6)
        if name.endswith("conv1"):
            cut.append(LayerRow(name=name, kind="Conv2d", action="cut", kept=width - width // 3 - i % 3, of=width))
        else:
            reason = "its output is added to a shortcut of fixed width"
            cut.append(LayerRow(name=name, kind="Conv2d", action="skipped", reason=reason))
        quantized.append(
            LayerRow(
                name=name, kind="Conv2d", action="quantized", bits=8.0, error=0.004 + 0.0007 * i,
                format="int8 per channel, inputs uint8 per tensor", range=(0.0, 4.25), clipped=0.0012,
            )
        )  # fmt: skip
    cut.append(LayerRow(name="linear", kind="Linear", action="skipped", reason="its output is the model's output"))
    quantized.append(LayerRow(name="linear", kind="Linear", action="quantized", bits=8.0, error=0.011))
    return (
        StepRecord(step={"type": "Prune", "pruning_ratio": 0.36, "criterion": {"type": "Taylor"}},
                   title="Prune 36 % of channels", seconds=14.2, layers=tuple(cut),
                   notes=("Batch norms were corrected by their difference to the original on 512 examples.",),
                   numbers={"channels_removed": 121.0},
                   edits=(Resize({"layer1.0.conv1.weight:0": (0, 2, 5)}, {"layer1.0.conv1.out_channels": 3}),)),
        StepRecord(step={"type": "Distill", "epochs": 4}, title="Distil from the original, 4 epochs", seconds=412.0,
                   notes=("Best epoch: 4, by a split of the training data.",),
                   numbers={"first_loss": 0.412, "last_loss": 0.083}),
        StepRecord(step={"type": "Quantize", "scheme": "W8A8"}, title="Quantize to W8A8", seconds=6.1,
                   layers=tuple(quantized), numbers={"calibration_examples": 512.0},
                   edits=(Swap("linear", "QuantizedLinear", {"bits": 8}),)),
    )  # fmt: skip


def make_behaviour():
    def bins(shift):
        centres = [(i + 0.5) / 15 for i in range(15)]
        counts = [0, 0, 0, 2, 11, 25, 61, 88, 102, 120, 149, 201, 288, 530, 3423]
        return [[n, c, max(0.0, c - shift * (1 - c)) if n else 0.0] for n, c in zip(counts, centres)]

    return {
        "examples": 5000, "right_to_wrong": 112, "wrong_to_right": 81, "changed": 231, "kl": 0.0213,
        "before": {"ece": 0.0391, "brier": 0.1342, "nll": 0.3127, "bins": bins(0.35)},
        "after": {"ece": 0.0318, "brier": 0.1381, "nll": 0.3159, "bins": bins(0.22)},
        "classes": [
            {"label": 3, "examples": 500, "before": 0.842, "after": 0.818},
            {"label": 5, "examples": 500, "before": 0.868, "after": 0.882},
            {"label": 2, "examples": 500, "before": 0.894, "after": 0.882},
        ],
        "most_changed": [
            {"index": 4127, "shift": 0.874, "label": 3, "before": 3, "after": 5, "before_probability": 0.93,
             "after_probability": 0.88},
            {"index": 318, "shift": 0.792, "label": 6, "before": 4, "after": 6, "before_probability": 0.71,
             "after_probability": 0.90},
        ],
    }  # fmt: skip


def make_report():
    original = {"file_bytes": 1_102_400, "memory_bytes": 1_089_000, "bits_per_weight": 32.2, "parameters": 269_722,
                "macs": 40_813_184}  # fmt: skip
    compressed = {"file_bytes": 221_300, "memory_bytes": 189_500, "bits_per_weight": 8.6, "parameters": 176_250,
                  "macs": 19_204_096}  # fmt: skip
    return Report(
        title="ResNet-20 on CIFAR-10",
        verdict="drop 0.62 pt, at most 0.96 pt with 95 % confidence: within the limit of 1 pt",
        reason="the next narrower width lost more quality than allowed",
        met=True,
        goal={"target": "OpenVINO", "max_drop": 0.01, "objective": "latency", "latency_ms": 8.0, "confidence": 0.95},
        before=(
            measurement("original", "OpenVINO", "f32", 32, 15.2, 0.9148, latencies_ms=timings(15.2, 1), **original),
            measurement("original", "ONNX Runtime", "f32", 32, 18.9, 0.9148, **original),
            measurement("original", "OpenVINO", "f32", 1, 0.741, 0.9148, **original),
        ),
        after=(
            measurement("compressed", "OpenVINO", "int8", 32, 5.61, 0.9086, latencies_ms=timings(5.61, 2),
                        **compressed),
            measurement("compressed", "OpenVINO", "int8", 1, 0.412, 0.9086, **compressed),
        ),
        comparison={"drop": 0.0062, "upper_bound": 0.0096, "non_inferior": True},
        behaviour=make_behaviour(),
        steps=make_steps(),
        candidates=(
            Candidate(label="int8", quality=0.9141, latency_ms=9.8, file_bytes=301_000, met=False,
                      reason="slower than the limit of 8 ms"),
            Candidate(label="0.75 wide", quality=0.9120, latency_ms=11.3, file_bytes=640_000, met=False,
                      reason="slower than the limit of 8 ms"),
            Candidate(label="0.75 wide + int8", quality=0.9113, latency_ms=7.1, file_bytes=255_000, met=True),
            Candidate(label="0.64 wide + int8", quality=0.9086, latency_ms=5.61, file_bytes=221_300, met=True),
            Candidate(label="0.5 wide + int8", quality=0.8953, latency_ms=4.4, file_bytes=160_000, met=False,
                      reason="drop of up to 2.4 pt"),
        ),
        parity=({"target": "OpenVINO", "max_error": 0.0312, "mean_error": 0.0021, "agreement": 0.9996},),
        environment={"processor": "x86-64, 2 cores", "instruction_set": "avx2",
                     "versions": {"torch": "2.13.0", "openvino": "2026.2", "python": "3.11.9"}},
        seed=7,
        created="2026-03-14T09:26:53+00:00",
    )  # fmt: skip


@pytest.fixture
def report():
    return make_report()
