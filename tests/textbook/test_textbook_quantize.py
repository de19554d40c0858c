"""Q(x) = round(x · Q) / Q as the textbook writes it, computed by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gracile.formats import FixedPoint, Int, PerTensor


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "mlp": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        "conv net": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4), nn.Flatten()),
    }


@pytest.mark.parametrize("net", networks().values(), ids=networks())
@pytest.mark.parametrize("factor", [256, 100, 4])
def test_fixed_point(net: nn.Module, factor: int) -> None:
    changed = 0
    for parameter in net.parameters():
        w = parameter.detach().numpy()
        expected = np.round(w * np.float32(factor)) / np.float32(factor)
        fmt = FixedPoint(factor)
        decoded = fmt.decode(fmt.encode(parameter)).numpy()
        np.testing.assert_array_equal(decoded, expected)  # the same float32 operations
        changed += int((decoded != w).sum())
    assert changed > 0


@pytest.mark.parametrize("net", networks().values(), ids=networks())
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_integers_of_any_width_with_one_scale(net: nn.Module, bits: int) -> None:
    for parameter in net.parameters():
        w = parameter.detach().numpy()
        below, above, top = -w.min(), w.max(), np.float32(2 ** (bits - 1))
        if bits == 8:
            scale = max(below, above) / (top - 1)
        else:  # the farther end is the lowest code, of a negative scale where that end is positive
            scale = max(max(below, above) / top, min(below, above) / (top - 1)) * (-1 if above > below else 1)
        expected = np.round(w / scale) * scale
        fmt = Int(bits, PerTensor())
        decoded = fmt.decode(fmt.encode(parameter)).numpy()
        np.testing.assert_array_equal(decoded, expected)
        assert len(np.unique(decoded)) <= 2**bits
        assert bool((decoded != w).any())
