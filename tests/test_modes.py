from __future__ import annotations

import pytest
from torch import nn

from gracile.modes import eval_mode


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
