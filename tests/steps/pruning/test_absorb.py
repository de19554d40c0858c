"""Layers before a removed block that take up what it added: which, and with which weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from residual import ResidualMLP
from torch import Tensor, nn

import gracile as gc
from gracile.context import Context
from gracile.graph import find_blocks, trace
from gracile.recipe import Recorder
from gracile.steps.pruning.absorb import absorbing_layers
from gracile.steps.pruning.block_order import repair_blocks
from gracile.steps.pruning.blocks import skip_blocks


def net(normalised: bool = False) -> ResidualMLP:
    """normalised: the stream is normalised behind each sum."""
    return ResidualMLP(4, 6, 16, (1, 1, 1, 1), normalised=normalised)


def batches() -> list[Tensor]:
    return [torch.randn(64, 4, generator=torch.Generator().manual_seed(i)) for i in range(9)]


def without(model: nn.Module, indices: tuple[int, ...]) -> tuple[nn.Module, list[Any]]:
    blocks = find_blocks(model, lambda net: net(batches()[0]))
    gone = [blocks[i] for i in indices]
    short = copy.deepcopy(model)
    skip_blocks(short, gone)
    return short, gone


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ((1,), {"blocks.0.down": ("blocks.1",)}),
        ((2, 1), {"blocks.0.down": ("blocks.1", "blocks.2")}),
        ((3, 1), {"blocks.0.down": ("blocks.1",), "blocks.2.down": ("blocks.3",)}),
        ((0,), {}),
    ],
)
def test_the_layer_is_the_one_whose_sum_the_block_receives(indices: tuple[int, ...], expected: Any) -> None:
    model = net().eval()
    short, gone = without(model, indices)

    def run(net: nn.Module) -> Any:
        return net(batches()[0])

    order = [layer.name for layer in trace(model, run).layers]
    assert absorbing_layers(model, trace(short, run), order, gone, run) == expected


def test_a_stream_that_is_normalised_behind_the_sum_has_none() -> None:
    model = net(normalised=True).eval()
    short, gone = without(model, (1,))

    def run(net: nn.Module) -> Any:
        return net(batches()[0])

    order = [layer.name for layer in trace(model, run).layers]
    assert absorbing_layers(model, trace(short, run), order, gone, run) == {}


@torch.no_grad()
def test_its_weights_are_the_regression_of_its_output_and_the_block_s() -> None:
    """Against torch.linalg.lstsq on the eight batches that are fitted."""
    model: Any = net().eval()
    short, gone = without(model, (1,))
    context = Context(gc.Data(calibration=batches()), model, model)
    step = gc.Prune(0.25, pattern=gc.Layers(), repair=gc.solvers.LeastSquares(damping=1e-12), correct=False)
    repair_blocks(short, model, gone, batches()[0], step, context, Recorder(step))
    x = model.stem(torch.cat([batch for i, batch in enumerate(batches()) if i % 8]))
    hidden = torch.tanh(model.blocks[0].up(x))
    target = model.blocks[1](model.blocks[0](x)) - x
    rows = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    expected = torch.linalg.lstsq(rows, target.double()).solution.T
    found: Any = short.get_submodule("blocks.0.down")
    # The moments are sums of float32 products, and the hidden units are correlated.
    torch.testing.assert_close(found.weight.double(), expected[:, :-1], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(found.bias.double(), expected[:, -1], rtol=1e-2, atol=2e-3)
