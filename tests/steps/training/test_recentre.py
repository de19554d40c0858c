"""Batch norms restated: the same function in eval mode, and nearly so in training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gracile.context import Context
from gracile.data import Data
from gracile.steps import SGD, Distill
from gracile.steps.training.recentre import BATCHES, recentre_batch_norms

BATCH = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(BATCHES)]


def net() -> nn.Sequential:
    """Statistics far from those of what arrives, a gain of zero, and a norm without one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.BatchNorm1d(10),
    )
    for norm in (model[1], model[7]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 3)
    with torch.no_grad():
        model[1].weight[2] = 0
    return model.eval()


def test_the_function_stays_and_the_statistics_are_those_of_the_batches() -> None:
    model = net().double()
    batches = [x.double() for x in BATCH]
    before, state = model(batches[0]), copy.deepcopy(model.state_dict())
    assert recentre_batch_norms(model, model, batches) == 2
    torch.testing.assert_close(model(batches[0]), before, rtol=0, atol=1e-12)
    arrives = model[0](torch.cat(batches))
    torch.testing.assert_close(model[1].running_mean, arrives.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, arrives.var((0, 2, 3), correction=0))
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items() if n.startswith(("0.", "3.", "4.")))
    again = copy.deepcopy(model.state_dict())
    recentre_batch_norms(model, model, batches)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, again[name])


def test_in_training_mode_the_net_now_computes_nearly_what_it_does() -> None:
    model = net()
    model[4] = nn.Identity()
    x = torch.cat(BATCH)
    with torch.no_grad():
        wanted, before = model(x), copy.deepcopy(model).train()(x)
        recentre_batch_norms(model, model, BATCH)
        after = copy.deepcopy(model).train()(x)
    assert float((before - wanted).norm()) > 0.3 * float(wanted.norm())
    assert float((after - wanted).norm()) < 1e-3 * float(wanted.norm())  # one batch of all, in float32


def test_training_at_a_rate_of_nearly_nothing_changes_nearly_nothing() -> None:
    """Without it, the stored statistics alone would move the function far."""
    model = net()
    model[4] = nn.Identity()
    teacher = copy.deepcopy(model)
    data = Data(train=BATCH)
    Distill(epochs=2, optimizer=SGD(1e-9, 0, 0), held_out=0)(model, Context(data, teacher, teacher))
    assert not torch.equal(model[1].running_mean, teacher[1].running_mean)
    with torch.no_grad():
        wanted, found = teacher(BATCH[0]), model.eval()(BATCH[0])
    # what is left is how the statistics of one batch of 64 differ from those of all
    assert float((found - wanted).norm()) < 0.1 * float(wanted.norm())


def test_a_net_without_norms_is_not_run() -> None:
    assert recentre_batch_norms(nn.Sequential(nn.Linear(2, 2)), lambda _: 1 / 0, [torch.zeros(1, 2)]) == 0
