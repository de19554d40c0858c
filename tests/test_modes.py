from __future__ import annotations

import pytest
import torch
from torch import nn

from gracile.modes import channels_last, eval_mode


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model.train()
    model[2].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_of_every_model_is_in_eval_mode_and_comes_back() -> None:
    a, b = net(), nn.Linear(2, 2).eval()
    before = modes(a)
    assert before == [True, True, True, False, False]
    with eval_mode(a, b):
        assert not any(modes(a)) and not any(modes(b))
    assert modes(a) == before and modes(b) == [False]


def test_an_error_leaves_no_mode_changed() -> None:
    a = net()
    before = modes(a)
    with pytest.raises(ZeroDivisionError), eval_mode(a):
        raise ZeroDivisionError
    assert modes(a) == before


def test_kernels_are_channels_last_within_and_as_before_after() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    kernels = [model[0].weight, model[1].weight]
    before = [kernel.data_ptr() for kernel in kernels]
    with channels_last(model, lambda net: net(x)):
        assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [True, True]
        assert not kernels[0].is_contiguous()
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            kernels[1].mul_(2)  # trained
    assert all(kernel.is_contiguous() for kernel in kernels) and model[0].weight is kernels[0]
    assert kernels[0].data_ptr() == before[0], "what was not written into is where it was, shared or not"


@pytest.mark.parametrize("training_only", [False, True])
def test_a_model_that_takes_a_view_keeps_its_layout(training_only: bool) -> None:
    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(128, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            x = x.flatten(1) if training_only and not self.training else x.view(len(x), -1)
            return torch.dropout(self.fc(x), 0.5, self.training)

    model, x = LeNet().eval(), torch.randn(2, 3, 6, 6)
    state, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    with channels_last(model, lambda net: net(x)):
        assert model.conv.weight.is_contiguous() and not model.training
        model(x)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), random)
