from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gracile.steps.quantization.fold import fold_batch_norms

LAYERS: dict[str, tuple[Any, int, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 6, 3, bias=False), 6, (2, 3, 7, 7)),
    "conv with bias": (lambda: nn.Conv2d(3, 6, 3, padding=1), 6, (2, 3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 6, (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), 8, (2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), 6, (2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), 6, (2, 3, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, stride=2), 6, (2, 3, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), 6, (2, 4, 5, 5)),
    "transposed, grouped 1d": (lambda: nn.ConvTranspose1d(6, 9, 3, groups=3), 9, (2, 6, 5)),
    "linear": (lambda: nn.Linear(4, 6), 6, (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), 6, (5, 4)),
}


def norm_for(shape: tuple[int, ...], channels: int, affine: bool = True) -> nn.Module:
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm: nn.Module = kind(channels, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        norm.running_var.uniform_(0.1, 5)  # type: ignore[union-attr,operator]
        if affine:
            norm.weight.normal_()  # type: ignore[union-attr,operator]
            norm.bias.normal_()  # type: ignore[union-attr,operator]
    return norm


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_layer_computes_what_both_did(name: str, affine: bool) -> None:
    torch.manual_seed(0)
    make, channels, shape = LAYERS[name]
    net = nn.Sequential(make(), norm_for(shape, channels, affine), nn.ReLU()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(net)
    assert fold_batch_norms(net, [("0", "1")], {"0"}) == [("0", "1")]
    assert isinstance(net[1], nn.Identity) and isinstance(net[0].bias, nn.Parameter)
    with torch.no_grad():
        # Float64: sums of some dozen products of size 1 in another order.
        torch.testing.assert_close(net(x), before(x), rtol=0, atol=1e-10)
        assert float((before[0](x) - before(x)).abs().max()) > 0.1  # the norm does something


def test_only_chosen_layers_are_folded_and_a_norm_without_statistics_stays() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)
    )
    assert fold_batch_norms(net, [("0", "1"), ("2", "3")], {"2"}) == []
    assert isinstance(net[1], nn.BatchNorm2d) and isinstance(net[3], nn.BatchNorm2d)


def test_zeros_and_the_weight_s_type_stay() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), norm_for((1, 1, 1, 1), 3)).to(torch.bfloat16)
    with torch.no_grad():
        net[0].weight[:, 0] = 0
    fold_batch_norms(net, [("0", "1")], {"0"})
    assert not net[0].weight[:, 0].any() and net[0].weight.dtype == net[0].bias.dtype == torch.bfloat16
