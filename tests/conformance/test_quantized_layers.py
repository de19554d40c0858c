"""Every format in every kind of layer: saved and loaded to the bit, exported with parity, trained; or refused.

A new format joins by a row of FORMATS, a new kind of layer by one of KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gracile as gc
import gracile.formats as formats
from gracile.environment import has_int8_dot_product
from gracile.formats import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    FixedPoint,
    Format,
    Int,
    MidRise,
    PerChannel,
    PerGroup,
    PerTensor,
    PowersOfTwo,
    Ternary,
)
from gracile.nn import QuantizedLayer, QuantizedRecurrent, begin_training, end_training

FORMATS: list[Format | gc.Scheme] = [
    *(Int(bits) for bits in (8, 7, 5, 4, 3, 2)),
    Int(8, PerTensor(), symmetric=False),
    Int(4, PerGroup(8)),
    Int(3, PerGroup(6), symmetric=False),
    NF4(PerGroup(8)),
    FP4(PerChannel(0)),
    Ternary(),
    Binary(),
    MidRise(2),
    MidRise(3, PerGroup(8)),
    gc.Scheme("W2A2", MidRise(2), gc.W2A2.input),
    FP8(),
    MXFP4(),
    NVFP4(),
    PowersOfTwo(5),
    Codebook(3),
    FixedPoint(256),
    gc.W8A8,
    gc.formats.W7A8,
    gc.formats.W8A8Dynamic,
    gc.formats.W7A8Dynamic,
    gc.W4A8,
    gc.W2A2,
]


class Sequences(nn.Module):
    """Frames [n, 12, 8] through a recurrent layer to [n, 4]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x)[0][:, -1])
        return y


#: Kind of layer -> (a model with it, the shape of an example).
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), (12,)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), (4, 8)),
    "Conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
        ),
        (4, 8, 8),
    ),
    "grouped and depthwise Conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 4)
        ),
        (4, 6, 6),
    ),
    "ConvTranspose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)),
        (4, 2, 2),
    ),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(20, 12), nn.Flatten(), nn.Linear(60, 4)), (5,)),
    "LSTM": (lambda: Sequences(nn.LSTM(8, 8, batch_first=True)), (12, 8)),
    "GRU": (lambda: Sequences(nn.GRU(8, 4, bidirectional=True, batch_first=True)), (12, 8)),
    "RNN": (lambda: Sequences(nn.RNN(8, 8, num_layers=2, batch_first=True)), (12, 8)),
}
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def example(kind: str, count: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *KINDS[kind][1])
    if kind == "Embedding":
        return torch.randint(0, 20, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def compressed(kind: str, fmt: Format | gc.Scheme) -> gc.Result:
    data = gc.Data(calibration=[example(kind, seed=seed) for seed in range(3)])
    return gc.compress(build(kind), gc.Quantize(fmt, correct=False), data)


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def test_every_format_and_scheme_is_tested() -> None:
    known = [getattr(formats, name) for name in formats.__all__]
    classes = {c for c in known if isinstance(c, type) and issubclass(c, Format) and c is not Format}
    concrete = {c for c in classes if not getattr(c, "__abstractmethods__", None)}
    assert concrete <= {type(fmt) for fmt in FORMATS if isinstance(fmt, Format)}


@every_format
@every_kind
def test_saved_and_loaded_to_the_bit(kind: str, fmt: Format | gc.Scheme, tmp_path: Path) -> None:
    result, x = compressed(kind, fmt), example(kind, seed=9)
    replaced = [m for m in result.model.modules() if isinstance(m, (QuantizedLayer, QuantizedRecurrent))]
    skipped = [row for row in result.report.steps[0].layers if row.action == "skipped"]
    assert replaced and all(row.reason for row in skipped)
    assert not [m for m in result.model.modules() if type(m) in (nn.Linear, nn.LSTM, nn.GRU, nn.RNN, nn.Conv2d)]
    result.save(tmp_path / "slim")
    expected = answers(result.model, x)
    assert bool(torch.isfinite(expected).all()) and not torch.equal(expected, answers(build(kind), x))
    assert torch.equal(answers(gc.load(tmp_path / "slim", build(kind)), x), expected)


@every_format
@every_kind
def test_training_begins_and_ends_at_the_same_function(kind: str, fmt: Format | gc.Scheme) -> None:
    model, x = compressed(kind, fmt).model, example(kind, seed=9)
    before = answers(model, x)
    begin_training(model, build(kind))
    # A batch norm that stands behind its layer again computes the same in another order of operations.
    torch.testing.assert_close(answers(model, x), before, rtol=1e-4, atol=1e-5)
    end_training(model)
    assert torch.equal(answers(model, x), before)
    begin_training(model, build(kind))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.enable_grad():
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    trained = answers(model, x)
    end_training(model)
    torch.testing.assert_close(answers(model, x), trained, rtol=1e-4, atol=1e-4)
    assert not torch.equal(trained, before)


@pytest.mark.slow
@pytest.mark.parametrize("target", [gc.OnnxRuntime(), gc.OpenVINO()], ids=lambda target: target.name)
@every_format
@every_kind
def test_exported_with_parity(kind: str, fmt: Any, target: gc.targets.Target, tmp_path: Path) -> None:
    pytest.importorskip(target.name)
    result, x = compressed(kind, fmt), example(kind, seed=9)
    expected = answers(result.model, x)
    found = target.run(target.export(result.model, x, tmp_path / f"model{target.suffix}"), x)
    # Integer layers may round a value that lies on an edge to the other side: a step of the layer's own grid.
    bits = min([8, *(m.output_format.bits for m in result.model.modules() if getattr(m, "output_format", None))])
    reads = [m.input_format.bits for m in result.model.modules() if getattr(m, "input_format", None)]
    weights = [m.weight_format.bits for m in result.model.modules() if getattr(m, "input_format", None)]
    if max(weights, default=0) == 8 and not has_int8_dot_product():
        pytest.skip("kernels of this processor add two products in 16 bits, which 8-bit weights overflow")
    tolerance = 2 / (2 ** min([bits, *reads]) - 1) if reads else 1e-3
    if any(getattr(m, "dynamic", False) for m in result.model.modules()) and not target.capabilities.integer_lstms:
        tolerance *= 4  # the file's inputs and states are not rounded, at twelve steps, as the export's notes say
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
