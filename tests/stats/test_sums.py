"""What a layer's output is added to, on nets whose sums are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracile.stats.sums import read_call, read_layer, stream_of


class Net(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.join, self.ended = nn.Linear(4, 4), nn.Linear(4, 4), join, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.join(x, self.second(x.relu()))
        self.ended += 1
        return y


@pytest.mark.parametrize(
    "join",
    [
        lambda x, f: x + f,
        lambda x, f: f + x,
        lambda x, f: f.add_(x),
        lambda x, f: nn.functional.dropout(f, 0.5, False) + x,
    ],
    ids=["x + f", "f + x", "in place", "dropout between"],
)
def test_the_other_operand_is_the_stream(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x = Net(join).eval(), torch.randn(3, 4)
    inputs, stream = read_layer(net, "second", lambda model: model(x), "second")
    assert torch.equal(inputs, net.first(x).relu())
    assert stream is not None and torch.equal(stream, net.first(x))
    assert net.ended == 0  # the rest of the forward is not needed
    assert not net.second._forward_hooks and not net.second._forward_pre_hooks


@pytest.mark.parametrize(
    "join",
    [
        lambda x, f: x + 0.5 * f,
        lambda x, f: torch.add(x, f, alpha=2),
        lambda x, f: torch.cat([x, f], 1),
        lambda x, f: f + 1.0,
        lambda x, f: f + torch.ones(4),
        lambda x, f: x * f,
    ],
    ids=["scaled", "alpha", "concatenation", "number", "broadcast", "product"],
)
def test_no_stream_where_the_output_is_not_added_as_it_is(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, x = Net(join).eval(), torch.randn(3, 4)
    inputs, stream = read_layer(net, "second", lambda model: model(x), "second")
    assert stream is None and torch.equal(inputs, net.first(x).relu())


def test_of_a_layer_alone_only_the_input_is_read() -> None:
    net, x = Net(lambda x, f: x + f).eval(), torch.randn(3, 4)
    inputs, stream = read_layer(net, "second", lambda model: model(x))
    assert stream is None and torch.equal(inputs, net.first(x).relu()) and net.ended == 0


def test_a_block_is_given_the_first_tensor_and_returns_its_first_result() -> None:
    x, y, other = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    for args, kwargs, output in (((x, other), {}, y), ((None, x), {"mask": other}, (y, other)), ((), {"x": x}, (y,))):
        entered, left = stream_of(args, kwargs, output)
        assert entered is x and left is y


def test_the_first_call_is_read_and_the_forward_ends_behind_it() -> None:
    torch.manual_seed(0)
    twice, after = nn.Linear(3, 3), []
    net = nn.Sequential(twice, twice, nn.ReLU())
    net[2].register_forward_hook(lambda *_: after.append(1))
    x = torch.randn(4, 3)
    args, kwargs, output = read_call(twice, lambda: net(input=x))
    assert args[0] is x and not kwargs and not after
    torch.testing.assert_close(output, x @ twice.weight.T + twice.bias)
    net(x)
    assert after  # the hook is gone
