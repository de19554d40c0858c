"""That layers really run as integers: the operators of the graph as ONNX Runtime executes it, and their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracile.formats import FixedPoint, Format, Int, PerChannel, PerGroup, PerTensor
from gracile.targets import OnnxRuntime, OpenVINO
from gracile.targets.onnxruntime import OnnxRuntimeRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Quantizer = Callable[..., nn.Module]


def executed(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime executes."""
    optimized = path.with_suffix(".optimized.onnx")
    OnnxRuntimeRunner(path, 1, optimized=optimized)
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def errors(model: nn.Module, path: Path, x: Tensor) -> list[float]:
    """Largest error against PyTorch, as a share of the largest output, in each runtime that is here."""
    with torch.no_grad():
        expected = model(x)
    targets = [target for target in (OnnxRuntime(1), OpenVINO(1)) if target.available() is None]
    return [float((target.run(path, x) - expected).abs().max() / expected.abs().max()) for target in targets]


class Block(nn.Module):
    """A residual block as in CIFAR ResNets, with a shortcut that drops pixels and adds channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(out + x)


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16), Block(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def test_no_float_convolution_is_left_in_a_resnet(quantize: Quantizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    model = quantize(SmallResNet(), x, Int(8), outputs=[f"blocks.{i}.conv2" for i in range(3)])
    path = OnnxRuntime().export(model, x, tmp_path / "model.onnx")
    found = executed(path)
    assert found["QLinearConv"] == 7
    assert found["QLinearAdd"] == 2  # the third sum goes to a mean that is not quantized
    assert found["QGemm"] == 1
    assert not found.keys() & {"Conv", "FusedConv", "Gemm", "FusedGemm"}
    # shortcuts read the quantized tensor, half a step of 1/255 off, through three blocks, and codes flip at their edges
    assert max(errors(model, path, x)) < 0.05


X2, X3 = (8, 64), (2, 5, 64)


def mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 96, bias), nn.ReLU(), nn.Linear(96, 10, bias))


def uneven() -> nn.Sequential:
    """Its layers have rows of 64 and of 172 = 5 · 32 + 12 weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 172), nn.ReLU(), nn.Linear(172, 10))


# (model, input shape, weight, activations quantized?, operators that must run, operators that must not)
CASES: list[tuple[nn.Module, tuple[int, ...], Format, bool, dict[str, int], set[str]]] = [
    (mlp(), X2, Int(8), True, {"QGemm": 2}, {"Gemm", "MatMul"}),
    (mlp(), X2, Int(7), True, {"QGemm": 2}, {"Gemm", "MatMul"}),
    (mlp(), X2, Int(4), True, {"QGemm": 2}, {"Gemm", "MatMul"}),
    (mlp(), X2, Int(8, PerTensor()), True, {"QGemm": 2}, {"Gemm", "MatMul"}),
    (mlp(False), X2, Int(8), True, {"QGemm": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, Int(8), True, {"MatMulIntegerToFloat": 2}, {"Gemm", "MatMul"}),
    (mlp(), X2, Int(4, PerGroup(16)), True, {}, set()),
    (mlp(), X3, Int(8, PerGroup(32)), True, {"QuantizeLinear": 2}, set()),
    (mlp(), X2, Int(8), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, Int(8), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X2, Int(4, PerGroup(16)), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, Int(4, PerGroup(32)), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, Int(4, PerGroup(32), symmetric=False), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, Int(4, PerGroup(40)), False, {"MatMul": 2}, {"Gemm"}),  # no block that a kernel takes
    (uneven(), X2, Int(4, PerGroup(32)), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (uneven(), X3, Int(3, PerGroup(32), symmetric=False), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (uneven(), X3, Int(4, PerGroup(32)), True, {"QuantizeLinear": 2}, set()),
    (mlp(), X3, Int(3, PerGroup(32)), False, {"MatMulNBits": 2}, {"Gemm", "MatMul"}),
    (mlp(), X3, FixedPoint(256), False, {"MatMul": 2}, set()),
    (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3)), (2, 4, 9, 9), Int(8), True, {}, set()),
    (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2)), (2, 4, 5, 5), Int(8, PerChannel(1)), True, {}, set()),
    (nn.Sequential(nn.Conv1d(4, 8, 3)), (2, 4, 9), Int(4, PerGroup(12)), False, {}, set()),
    (nn.Sequential(nn.Conv1d(4, 8, 3)), (2, 4, 9), Int(4, PerGroup(5)), False, {}, set()),
]


@pytest.mark.parametrize(("model", "shape", "weight", "integers", "must", "must_not"), CASES)
def test_layers_run_as_the_kernels_meant_for_them(
    quantize: Quantizer,
    tmp_path: Path,
    model: nn.Module,
    shape: tuple[int, ...],
    weight: Format,
    integers: bool,
    must: dict[str, int],
    must_not: set[str],
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    new = quantize(model, x, weight, *([] if integers else [None]))
    path = OnnxRuntime().export(new, x, tmp_path / "model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    found = executed(path)
    assert {name: found[name] for name in must} == must
    assert not found.keys() & must_not
    # float32 sums in another order; with 8-bit inputs, one code may flip at its edge, and the bias is rounded to int32
    bound = 0.01 if integers else 1e-5
    assert max(errors(new, path, x)) < bound


@pytest.mark.parametrize(
    ("weight", "integers", "negative"),
    [
        (Int(4), True, False),
        (Int(7), True, False),
        (Int(2), False, False),
        (Int(3, PerGroup(32)), False, False),
        (Int(4), False, True),
        (Int(4, PerGroup(32)), False, True),
    ],
    ids=str,
)
def test_scales_in_the_file_are_positive_but_where_codes_have_no_room(
    quantize: Quantizer, tmp_path: Path, weight: Int, integers: bool, negative: bool
) -> None:
    """Codes are turned over with their scale: −8 becomes 8, which fits 8 bits and not 4."""
    x = torch.randn(X2, generator=torch.Generator().manual_seed(2))
    new = quantize(mlp(), x, weight, *([] if integers else [None]))
    assert any(bool((layer.weight_scale < 0).any()) for layer in new if hasattr(layer, "weight_scale"))
    path = OnnxRuntime().export(new, x, tmp_path / "model.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held]
    assert len(nodes) >= 2
    assert any(bool((held[n.input[1]] < 0).any()) for n in nodes) == negative


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(400, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Tied(Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.table.weight.T


@pytest.mark.parametrize(
    ("weight", "bits_in_file"),
    [
        (Int(8), 9),
        (Int(8, PerTensor()), 8),
        (Int(8, PerGroup(16)), 10),
        (Int(8, symmetric=False), 10),
        (Int(6), 9),
        (Int(4), 5),
        (Int(4, PerGroup(16)), 6),
        (Int(3, PerGroup(16), symmetric=False), 8),
        (Int(4, PerGroup(20)), 7),
        (Int(4, PerGroup(5), symmetric=False), 21),
        (FixedPoint(128), 32),
    ],
    ids=str,
)
def test_embeddings_stay_codes_in_the_file_and_in_memory(
    quantize: Quantizer, tmp_path: Path, weight: Format, bits_in_file: int
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 400, (3, 7))
    model = quantize(Lookup(), ids, weight)
    path = OnnxRuntime().export(model, ids, tmp_path / "model.onnx")
    assert max(errors(model, path, ids)) < 1e-6
    assert path.stat().st_size < 400 * 32 * bits_in_file / 8 + 6000  # the graph itself takes up to 6 kB
    expanded = [value for value in onnx.load(path).graph.initializer if value.data_type == onnx.TensorProto.FLOAT]
    largest = max((len(value.raw_data) for value in expanded), default=0)
    assert (largest >= 400 * 32 * 4) == isinstance(weight, FixedPoint)  # storage only there, and said so


def test_a_tied_table_serves_lookup_and_projection(quantize: Quantizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 400, (3, 7))
    model = quantize(Tied(), ids, Int(8))
    path = OnnxRuntime().export(model, ids, tmp_path / "model.onnx")
    assert max(errors(model, path, ids)) < 1e-5


@pytest.mark.parametrize("activation", [Int(8, PerTensor()), Int(4, PerTensor(), symmetric=False)], ids=str)
def test_other_activation_grids_are_kept(quantize: Quantizer, tmp_path: Path, activation: Int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(32, 16)
    new = quantize(model, x, Int(8), activation)
    path = OnnxRuntime().export(new, x, tmp_path / "model.onnx")
    assert max(errors(new, path, x * 1.5)) < 1e-3  # beyond the range as well: what is clipped is clipped there too
