"""What a trace tells of layers and cost, and that it leaves the model as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from nets import ZOO, example_for
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gracile.errors import ConfigError, ModelError
from gracile.graph import trace
from tests.memory import peak_bytes


def test_layers_in_call_order_with_shapes_parameters_and_macs_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    layers = trace(model, lambda m: m(torch.randn(4, 3, 8, 8))).layers
    assert [(layer.name, layer.kind) for layer in layers] == [("0", "Conv2d"), ("1", "BatchNorm2d"), ("4", "Linear")]
    assert [(layer.input_shape, layer.output_shape) for layer in layers] == [
        ((4, 3, 8, 8), (4, 8, 4, 4)),
        ((4, 8, 4, 4), (4, 8, 4, 4)),
        ((4, 128), (4, 5)),
    ]
    assert [layer.parameters for layer in layers] == [3 * 8 * 9 + 8, 16, 128 * 5 + 5]
    assert [layer.macs for layer in layers] == [16 * 8 * 27, 0, 640]
    assert [layer.calls for layer in layers] == [1, 1, 1]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("BiLSTM", "PackedQKV", "GroupedQuery")])
def test_macs_are_half_of_the_operations_that_pytorch_counts(name: str) -> None:
    """Without the nets whose fused operators PyTorch's counter does not know on this device."""
    model = ZOO[name]()
    batch = example_for(model)
    batch = batch if isinstance(batch, tuple) else (batch,)
    with FlopCounterMode(display=False) as counter:
        model(*batch)
    assert trace(model, lambda m: m(*batch)).macs == counter.get_total_flops() // 2 // 3


def test_macs_of_a_recurrent_layer_and_of_attention_by_hand() -> None:
    lstm = nn.LSTM(6, 5, batch_first=True)
    assert trace(lstm, lambda m: m(torch.randn(2, 7, 6))).macs == 7 * 4 * 5 * (6 + 5)

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    assert trace(Attend(), lambda m: m(q, k)).macs == 2 * 3 * 4 * 5 * 8


class Caching(nn.Module):
    """Keeps what it saw, as models with caches of masks or positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.sizes = (12, 5)
        self.seen = 0
        self.fc1, self.dropout, self.fc2 = nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[0] + self.width
        self.last = x
        return self.fc2(self.dropout(self.fc1(x)).view(x.shape[0], self.width)).view(-1, self.sizes[1])


def test_the_model_is_left_as_it_was() -> None:
    model = Caching().train()
    model.fc1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {key: type(value) for key, value in model.__dict__.items()}
    trace(model, lambda m: m(torch.randn(3, 6)))
    assert model.training
    assert model.dropout.training
    assert not model.fc1.training
    assert {key: type(value) for key, value in model.__dict__.items()} == attributes
    assert (model.width, model.sizes, model.seen) == (12, (12, 5), 0)
    assert not model._forward_hooks
    assert not model.fc1._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.fc1.weight.grad is None


def test_attributes_are_put_back_when_the_model_fails() -> None:
    model = Caching()
    with pytest.raises(ModelError, match=r"does not run on the batch given: RuntimeError"):
        trace(model, lambda m: m(torch.randn(3, 7)))
    assert type(model.width) is int
    assert model.training


def test_a_run_that_never_calls_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="was never called"):
        trace(nn.Linear(2, 2), lambda m: None)


class Strange(nn.Module):
    """An operator that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(torch.fft.rfft(self.fc1(x)).abs()).relu())


def test_an_operator_without_a_rule_freezes_what_it_touches_and_no_more() -> None:
    found = trace(Strange(), lambda m: m(torch.randn(3, 6)))
    assert found.unknown_operators == ("_fft_r2c",)
    assert found.group("fc1").frozen == "the operator '_fft_r2c' has no rule"
    assert found.group("fc2").frozen is None


def test_reasons_of_frozen_axes_are_for_people() -> None:
    model = ZOO["AttentionEncoder"]()
    found = trace(model, lambda m: m(example_for(model)))
    assert found.group("head").frozen == "it reaches the model's output"
    model = ZOO["PlainConv"]()
    found = trace(model, lambda m: m(example_for(model)))
    assert found.group("conv1#2").frozen == "it comes from the model's input"
    model = ZOO["TiedEmbedding"]()
    found = trace(model, lambda m: m(example_for(model)))
    assert found.group("embed#2").frozen == "it is the vocabulary of an embedding"


def test_a_group_that_does_not_exist_is_named_with_those_that_do() -> None:
    found = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), lambda m: m(torch.randn(2, 3)))
    with pytest.raises(ConfigError, match=r"no group 'x'(?s:.*)can be cut: 0\."):
        found.group("x")


def test_a_trace_does_not_keep_the_model_or_its_tensors_alive() -> None:
    model = ZOO["PlainConv"]()
    found = trace(model, lambda m: m(example_for(m)))
    watched = [weakref.ref(model), weakref.ref(model.conv1), weakref.ref(model.conv1.weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    assert found.group("conv1").units == 8


def test_a_caller_without_gradients_sees_the_same_groups() -> None:
    model = ZOO["AttentionEncoder"]()
    batch = example_for(model)

    def quietly(m: nn.Module) -> Tensor:
        with torch.no_grad():
            return m(batch)

    assert [g.name for g in trace(model, quietly).groups] == [g.name for g in trace(model, lambda m: m(batch)).groups]


def test_what_the_model_no_longer_reads_is_let_go() -> None:
    """Twenty layers, of whose outputs two are in use at a time, beside a copy that an operator makes of one."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(20)])
    x = torch.randn(1024, 16)
    assert peak_bytes(lambda: trace(model, lambda m: m(x))) < 4 * x.nbytes


class Force(nn.Module):
    """Minus the gradient of an energy, as nets of physics have it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x)[0]


def test_a_model_that_takes_gradients_in_its_forward_is_traced() -> None:
    traced = trace(Force(), lambda m: m(torch.randn(5, 3)))
    assert [layer.name for layer in traced.layers] == ["energy.0", "energy.2"]
