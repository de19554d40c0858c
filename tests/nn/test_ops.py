"""The two operators against NumPy, and their gradients against finite reasoning."""

from __future__ import annotations

import json

import numpy as np
import torch

from gracile.formats import FixedPoint, Int, PerGroup, format_to_config
from gracile.nn.ops import decode, quantize_dequantize


def test_quantize_dequantize_equals_numpy_bit_for_bit() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    scale, zero_point = torch.tensor(0.037), torch.tensor(93, dtype=torch.int32)
    found = quantize_dequantize(x, scale, zero_point, 0, 255)
    step = np.float32(0.037)
    q = np.clip(np.round(x.numpy() / step) + 93, 0, 255).astype(np.float32)
    assert np.array_equal(found.numpy(), (q - np.float32(93)) * step)
    assert len(np.unique(q)) > 50  # the range is used,
    assert (q == 0).any()  # and both ends clip
    assert (q == 255).any()


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    found = quantize_dequantize(x, torch.tensor(1.0), torch.tensor(0), -128, 127)
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0]


def test_the_dtype_of_x_is_kept() -> None:
    x = torch.randn(8, dtype=torch.bfloat16)
    assert quantize_dequantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127).dtype == torch.bfloat16


def test_the_gradient_is_one_inside_the_range_and_zero_outside() -> None:
    x = torch.tensor([-2.0, -0.4, 0.0, 2.4, 2.6, 9.0], requires_grad=True)
    quantize_dequantize(x, torch.tensor(1.0), torch.tensor(1), 0, 3).sum().backward()  # covers −1 … 2
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_decode_is_the_formats_own() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    for fmt in (Int(8), Int(4, PerGroup(8)), Int(3, symmetric=False), FixedPoint(64)):
        encoded = fmt.encode(weight)
        names = [name for name in encoded if name != "shape"]
        found = decode(
            [encoded[name] for name in names], ",".join(names), json.dumps(format_to_config(fmt)), weight.shape
        )
        assert torch.equal(found, fmt.decode(encoded))


def test_the_operators_pass_torchs_own_checks() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 255)
    torch.library.opcheck(torch.ops.gracile.quantize_dequantize.default, args, test_utils=checks)
    codes, scale = torch.ones(2, 3, dtype=torch.int8), torch.ones(2)
    config = json.dumps(format_to_config(Int(8)))
    torch.library.opcheck(
        torch.ops.gracile.decode.default, ([codes, scale], "codes,scale", config, [2, 3]), test_utils=checks
    )
