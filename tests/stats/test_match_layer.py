"""One layer's output matched to the original's: means and deviations by NumPy, biases and scales alone changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.formats import Int, format_to_config
from gracile.nn import quantize_layer
from gracile.stats.match_layer import ChannelMoments, match_layer, output_moments


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, generator=generator) for n in (5, 40, 11)]


def quantized(layer: nn.Linear, bits: int) -> nn.Module:
    fmt = Int(bits)
    encoded = fmt.encode(layer.weight.detach())
    tensors = {f"weight_{name}": t for name, t in encoded.items() if name != "shape"}
    tensors |= {"bias": layer.bias.detach()} if layer.bias is not None else {}
    return quantize_layer(layer, tensors, {"weight": format_to_config(fmt), "bias": layer.bias is not None})


def test_moments_are_of_all_batches_together() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    runs = [lambda net, x=x: net(x) for x in batches()]
    found = output_moments(nn.Sequential(layer), ["0"], runs)["0"]
    rows = layer(torch.cat(batches())).detach().double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance.numpy(), rows.var(0), rtol=1e-6)


@pytest.mark.parametrize(("bits", "scaled"), [(2, True), (3, True), (8, False)])
def test_the_output_gets_the_mean_and_below_eight_bits_the_deviation_of_the_original(bits: int, scaled: bool) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(6, 4), torch.cat(batches())
    wanted, present = ChannelMoments(), ChannelMoments()
    wanted.add(layer(x))
    small = quantized(layer, bits)
    codes = copy.deepcopy(small.weight_codes)
    present.add(small(x))
    match_layer(small, present, wanted)
    rows, expected = (net(x).detach().double() for net in (small, layer))
    torch.testing.assert_close(rows.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)
    if scaled:
        torch.testing.assert_close(rows.std(0), expected.std(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(small.weight_codes, codes)  # type: ignore[arg-type]


def test_a_layer_without_a_bias_stays_as_it_is() -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(6, 4, bias=False), torch.cat(batches())
    wanted, present = ChannelMoments(), ChannelMoments()
    wanted.add(layer(x))
    small = quantized(layer, 2)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    present.add(small(x))
    match_layer(small, present, wanted)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_forward_may_end_once_the_layers_have_run() -> None:
    seen = []
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    net[1].register_forward_hook(lambda *_: seen.append(1))
    output_moments(net, ["0"], [lambda n: n(batches()[0])], stop=True)
    assert not seen
    output_moments(net, ["0"], [lambda n: n(batches()[0])])
    assert seen == [1]
