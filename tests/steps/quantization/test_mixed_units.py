"""Budgets of bytes where layers are recurrent, or hold one weight: they take a format of their own choice too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import gracile as gc
from gracile.evaluate.size import state_bytes
from gracile.sensitivity import measure_sensitivity
from gracile.solvers import GPTQ

OPTIONS = (gc.Int(8), gc.Int(4), gc.Int(2))
each_solver = pytest.mark.parametrize("solver", [None, GPTQ(rounds=1)], ids=["nearest", "GPTQ"])


class Tagger(nn.Module):
    """Two recurrent layers, of which the second says next to nothing."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.much, self.little = nn.GRU(8, 24, batch_first=True), nn.GRU(8, 24, batch_first=True)
        self.head, self.packed = nn.Linear(24, 5), packed

    def forward(self, x: Tensor) -> Tensor:
        call: Any = x
        if self.packed:
            call = pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        (much, _), (little, _) = self.much(call), self.little(input=call)
        if self.packed:
            much, little = much.data, little.data
        y: Tensor = self.head(much + 0.02 * little)
        return y


class Language(nn.Module):
    """The table is read and multiplied by: one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.mix(self.words(x))))
        return y


def frames() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 10, 8, generator=generator) for _ in range(4)]


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (16, 12), generator=generator) for _ in range(4)]


CASES: list[tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], set[str]]] = [
    (Tagger, frames, {"much", "little", "head"}),
    (lambda: Tagger(packed=True), frames, {"much", "little", "head"}),
    (Language, tokens, {"words", "mix", "head"}),
]


@each_solver
@pytest.mark.parametrize(("make", "batches", "names"), CASES, ids=["recurrent", "packed", "tied"])
@pytest.mark.parametrize("share", [0.3, 0.2])
def test_all_layers_take_formats_within_the_bytes(
    share: float, make: Any, batches: Any, names: set[str], solver: GPTQ | None
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    data = gc.Data(calibration=batches())
    result = gc.compress(model, gc.Quantize(to=gc.Bytes(share), options=OPTIONS, solver=solver), data)
    record = result.report.steps[0]
    assert {row.name for row in record.layers if row.action == "quantized"} == names
    assert state_bytes(result.model) <= share * state_bytes(model)
    assert record.numbers["bytes"] == state_bytes(result.model)


def test_the_layer_that_says_little_has_fewer_bits() -> None:
    torch.manual_seed(0)
    data = gc.Data(calibration=frames())
    result = gc.compress(Tagger().eval(), gc.Quantize(to=gc.Bytes(0.22), options=OPTIONS), data)
    bits = {
        name: next(iter(result.model.get_submodule(name).encoded.values())).weight_format.bits  # type: ignore[operator,union-attr]
        for name in ("much", "little")
    }
    assert bits["little"] < bits["much"]


def test_tied_layers_go_on_holding_one_weight() -> None:
    torch.manual_seed(0)
    data = gc.Data(calibration=tokens())
    result = gc.compress(Language().eval(), gc.Quantize(to=gc.Bytes(0.2), options=OPTIONS), data)
    words, head = (result.model.get_submodule(name) for name in ("words", "head"))
    assert words.weight_codes is head.weight_codes and words.weight_format == head.weight_format


@pytest.mark.parametrize(("make", "batches", "units"), [
    (Tagger, frames, ["much", "little", "head"]),
    (Language, tokens, ["words", "mix"]),
], ids=["recurrent", "tied"])  # fmt: skip
def test_sensitivity_tells_of_them_too(make: Any, batches: Any, units: list[str]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    found = measure_sensitivity(model, gc.Data(calibration=batches()), OPTIONS)
    assert [row.name for row in found.layers] == units
    assert all(row.losses[0] < row.losses[1] < row.losses[2] for row in found.layers)
