from __future__ import annotations

import pytest
import torch
from torch import nn

from gracile.errors import DataError
from gracile.evaluate.size import bits_per_weight, count_parameters, file_bytes, state_bytes


def test_a_plain_layer_counts_every_weight_at_its_own_width():
    layer = nn.Linear(3, 5)
    assert state_bytes(layer) == (15 + 5) * 4
    assert state_bytes(layer.half()) == (15 + 5) * 2
    assert bits_per_weight(layer) == 16
    assert count_parameters(layer).total == 20


def test_buffers_count_unless_they_are_not_stored():
    norm = nn.BatchNorm1d(4)
    assert state_bytes(norm) == 4 * 4 * 4 + 8  # weight, bias, mean, variance; the counter is int64
    norm.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert state_bytes(norm) == 4 * 4 * 4 + 8


def test_shared_tensors_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.twice = nn.ModuleList([nn.Linear(4, 4, bias=False)] * 2)
            self.view = nn.Parameter(self.embedding.weight.data)  # another parameter of the same memory

    assert state_bytes(Tied()) == (40 + 16) * 4
    assert count_parameters(Tied()).total == 56


def test_tensors_without_memory_do_not_stand_for_each_other():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    assert state_bytes(model) == 2 * 20 * 4


def test_zeros_are_counted():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)[:, 1] = 0
    assert (count_parameters(layer).zeros, count_parameters(layer).sparsity) == (4, 0.25)


def test_packed_weights_count_as_what_they_decode_to():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(8, 4, dtype=torch.uint8))  # two 4-bit codes a byte
            self.register_buffer("scale", torch.ones(8))

        @property
        def weight(self):
            low, high = self.codes & 15, self.codes >> 4
            return torch.stack((low, high), dim=-1).reshape(8, 8) * self.scale[:, None]

    model = nn.Sequential(Packed())
    assert count_parameters(model).total == 64
    assert count_parameters(model).zeros == 64
    assert bits_per_weight(model) == 8 * (32 + 32) / 64  # 4 bits of code and 4 of scale


def test_bytes_of_a_file_and_of_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "weights.bin").write_bytes(b"x" * 32)
    assert file_bytes(tmp_path / "model.onnx") == 10
    assert file_bytes(tmp_path) == 42
    with pytest.raises(DataError, match=r"absent\.onnx"):
        file_bytes(tmp_path / "absent.onnx")


def test_a_model_without_weights_has_no_bits():
    assert bits_per_weight(nn.ReLU()) == 0
