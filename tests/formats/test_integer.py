from __future__ import annotations

import numpy as np
import pytest
import torch

from gracile.errors import ConfigError, DataError
from gracile.formats import Int, PerChannel, PerGroup, PerTensor, bits_per_weight


def test_codes_and_scales_by_hand() -> None:
    tensors = Int(4).encode(torch.tensor([[7.0, -1.4, 3.5, 0.0], [0.7, -0.7, 0.05, 0.1]]))
    # 7 reaches farther than -1.4 and so is code -8 of a negative scale; 0.7 and -0.7 are equally far.
    assert tensors["scale"].tolist() == pytest.approx([-7 / 8, 0.1])
    # codes -8, 2 (1.6), -4, 0 and 7, -7, 0 or 1, 1: low nibble first
    assert tensors["codes"].tolist()[:2] == [0x28, 0x0C]
    assert tensors["codes"].tolist()[2] == 0x97


def test_asymmetric_by_hand() -> None:
    tensors = Int(8, PerTensor(), symmetric=False).encode(torch.tensor([-1.0, 0.0, 4.1]))
    assert tensors["scale"].item() == pytest.approx(5.1 / 255)
    assert tensors["zero_point"].item() == 50
    assert tensors["zero_point"].dtype == torch.int16
    assert tensors["codes"].tolist() == [0, 50, 255]
    assert tensors["codes"].dtype == torch.uint8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_channel_against_numpy(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(bits))
    w = weight.numpy()
    expected = np.empty_like(w)
    for c in range(5):
        if symmetric:
            qmin, qmax, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, np.float32(0)
            scale = np.abs(w[c]).max() / np.float32(qmax)
            if bits < 8:
                below, above = -w[c].min(), w[c].max()
                scale = max(max(below, above) / np.float32(-qmin), min(below, above) / np.float32(qmax))
                scale = -scale if above > below else scale
        else:
            qmin, qmax = 0, 2**bits - 1
            low, high = min(w[c].min(), np.float32(0)), max(w[c].max(), np.float32(0))
            scale = high / np.float32(qmax) - low / np.float32(qmax)
            zero = np.round(-low / scale)
        expected[c] = (np.clip(np.round(w[c] / scale) + zero, qmin, qmax) - zero) * scale
    fmt = Int(bits, symmetric=symmetric)
    # The same float32 operations in the same order.
    np.testing.assert_array_equal(fmt.decode(fmt.encode(weight)).numpy(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bit_codes_equal_onnxruntime(symmetric: bool) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    fmt = Int(8, PerTensor(), symmetric=symmetric)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    tensors = fmt.encode(x.clamp(-4, 5))
    kind = onnx.TensorProto.INT8 if symmetric else onnx.TensorProto.UINT8
    zero = int(tensors["zero_point"]) if not symmetric else 0
    node = onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"])
    graph = onnx.helper.make_graph(
        [node],
        "quantize",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1000])],
        [onnx.helper.make_tensor_value_info("codes", kind, [1000])],
        [
            onnx.numpy_helper.from_array(tensors["scale"].numpy(), "scale"),
            onnx.numpy_helper.from_array(np.array(zero, np.int8 if symmetric else np.uint8), "zero"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.numpy()})[0]  # some of x lies outside the range and saturates
    codes = fmt.quantize(x, tensors["scale"], tensors.get("zero_point"))
    np.testing.assert_array_equal(codes.numpy(), expected)


def test_a_given_scale_clips() -> None:
    tensors = Int(8).encode(torch.tensor([[1.0, -2.0, 0.5]]), scale=torch.tensor([0.5 / 127]))
    assert tensors["codes"].tolist() == [[127, -128, 127]]


def test_an_all_zero_channel_gets_scale_one() -> None:
    tensors = Int(8).encode(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert tensors["scale"][0].item() == 1.0
    assert Int(8, symmetric=False).encode(torch.zeros(2, 2))["zero_point"].tolist() == [0, 0]


def test_scales_are_never_denormal() -> None:
    weight = torch.tensor([[1e-40, -3e-41]])
    for symmetric in (True, False):
        scale = Int(8, symmetric=symmetric).encode(weight)["scale"]
        assert scale.item() == torch.finfo(torch.float32).tiny


def test_ranges_of_activations_give_normal_scales_too() -> None:
    low, high = torch.tensor([-1e-40, 0.0, 0.0]), torch.tensor([1e-41, 0.0, 510.0])
    tiny = torch.finfo(torch.float32).tiny
    scale, zero_point = Int(8, PerTensor(), symmetric=False).scale_of(low, high)
    assert scale.tolist() == [tiny, 1.0, 2.0]
    assert zero_point is not None
    assert zero_point.tolist() == [0, 0, 0]
    assert Int(8, PerTensor()).scale_of(low, high)[0].tolist()[:2] == [tiny, 1.0]


def test_ranges_wider_than_float32_still_fit() -> None:
    weight = torch.tensor([[-3e38, 3e38]])
    fmt = Int(8, symmetric=False)
    assert torch.isfinite(fmt.decode(fmt.encode(weight))).all()


def test_bits_per_weight_counts_the_scales() -> None:
    assert bits_per_weight(Int(4, PerGroup(32)), (64, 64)) == 4 + 32 / 32
    assert bits_per_weight(Int(8, PerTensor(), symmetric=False), (10,)) == 8 + 48 / 10


@pytest.mark.parametrize("bits", [1, 9, 0, 2.5, True, "4"])
def test_impossible_bits_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match="from 2 to 8"):
        Int(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fmt", "settings", "said"),
    [
        (Int(8), {"scale": torch.ones(4)}, "expected shape"),
        (Int(8), {"scale": torch.tensor([1.0, -1.0, 1.0])}, "positive"),
        (Int(8), {"scale": torch.tensor([1.0, float("nan"), 1.0])}, "positive"),
        (Int(8), {"scale": torch.ones(3), "zero_point": torch.zeros(3)}, "symmetric=False"),
        (Int(8, symmetric=False), {"zero_point": torch.zeros(3)}, "goes with a scale"),
        (Int(4, symmetric=False), {"scale": torch.ones(3), "zero_point": torch.full((3,), 16)}, "must lie in"),
    ],
)
def test_impossible_scales_are_refused(fmt: Int, settings: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fmt.encode(torch.ones(3, 2), **settings)


def test_integers_are_no_weights() -> None:
    with pytest.raises(DataError, match="not floating point"):
        Int(8).encode(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="PerTensor"):
        Int(8, 128)  # type: ignore[arg-type]
    assert Int().granularity == PerChannel(0)


def test_one_factor_behind_a_sum_of_products() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8)
    for granularity in (PerTensor(), PerChannel(0), PerChannel(1), PerGroup(4)):
        fmt = Int(8, granularity)
        encoded = fmt.encode(weight)
        sums = x @ fmt.unpack(encoded["codes"], (3, 8)).double().T
        factors = x @ fmt.decode(encoded).double().T / sums
        assert fmt.scaled_by_output == bool((factors.std(0) < 1e-6 * factors.mean(0).abs()).all())
    assert not Int(8, symmetric=False).scaled_by_output
