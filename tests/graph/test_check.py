"""The check itself: it must pass what is right and catch what is wrong."""

from __future__ import annotations

import copy

import torch
from nets import ZOO, example_for
from torch import nn

from gracile.graph import check_cut, plan_resize, trace
from gracile.graph.check import zero_units
from gracile.surgery import apply


def test_a_right_cut_is_exact_and_a_wrong_one_is_not() -> None:
    model = ZOO["PlainConv"]()
    batch = example_for(model)
    found = trace(model, lambda m: m(batch))
    keep = {"conv2": [0, 1, 2, 5, 6, 8, 9, 11]}
    right, wrong = copy.deepcopy(model), copy.deepcopy(model)
    apply(right, [plan_resize(found, keep)])
    apply(wrong, [plan_resize(found, {"conv2": [0, 1, 2, 3, 6, 8, 9, 11]})])
    check = check_cut(model, right, found, keep, lambda m: m(batch))
    assert (check.ran, check.exact, check.reason) == (True, True, None)
    check = check_cut(model, wrong, found, keep, lambda m: m(batch))
    assert (check.ran, check.exact) == (True, False)
    assert check.max_error is not None
    assert check.max_error > 1e-4


def test_a_model_that_does_not_run_is_told_so() -> None:
    model = ZOO["PlainConv"]()
    batch = example_for(model)
    found = trace(model, lambda m: m(batch))
    broken = copy.deepcopy(model)
    broken.fc = nn.Linear(3, 5)
    check = check_cut(model, broken, found, {"conv2": list(range(8))}, lambda m: m(batch))
    assert not check.ran
    assert check.max_error is None
    assert check.reason is not None
    assert "does not run" in check.reason


def test_neither_model_is_changed_and_the_default_dtype_stays() -> None:
    model = ZOO["OwnCell"]()
    batch = example_for(model)
    found = trace(model, lambda m: m(batch))
    cut = copy.deepcopy(model)
    keep = {"input": [0, 2, 4]}
    apply(cut, [plan_resize(found, keep)])
    before = [p.clone() for m in (model, cut) for p in m.parameters()]
    check_cut(model, cut, found, keep, lambda m: m(batch))
    after = [p for m in (model, cut) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert torch.get_default_dtype() == torch.float32


def test_zeroing_touches_consumers_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = trace(model, lambda m: m(torch.randn(2, 3)))
    first, second = model[0].weight.clone(), model[2].weight.clone()
    zero_units(model, found, {"0": [0, 2, 3]})
    assert torch.equal(model[0].weight, first)
    assert torch.equal(model[2].weight[:, [0, 2, 3]], second[:, [0, 2, 3]])
    assert not model[2].weight[:, 1].any()


def test_a_normed_weight_whose_inputs_are_cut_is_proven_by_its_gains() -> None:
    # Of a transposed convolution the norm is taken per input: zero directions would be 0/0, zero gains are not.
    torch.manual_seed(0)
    up = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 6, 4, 2))
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), up, nn.Conv1d(6, 2, 1)).eval()
    x = torch.randn(2, 3, 10)
    found = trace(model, lambda m: m(x))
    exact = {g.name: g.exact for g in found.groups if g.frozen is None}
    assert exact == {"0": None, "2": "a weight norm is taken over it"}
    keep = {"0": [0, 1, 3, 4, 6]}
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(found, keep)])
    assert check_cut(model, cut, found, keep, lambda m: m(x)).exact


def test_nan_on_one_side_only_is_a_difference() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    run = lambda m: m(torch.ones(2, 3))  # noqa: E731
    found = trace(model, run)
    keep = {"0": [0, 2, 3]}
    cut = copy.deepcopy(model)
    apply(cut, [plan_resize(found, keep)])
    with torch.no_grad():
        cut[2].bias[0] = float("nan")
    check = check_cut(model, cut, found, keep, run)
    assert (check.ran, check.exact, check.finite) == (True, False, False)
