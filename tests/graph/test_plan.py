"""The edit of a cut: indices and attributes by hand, and refusals before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import ZOO, example_for
from torch import nn

from gracile.errors import ConfigError
from gracile.graph import Trace, cut_macs, plan_resize, trace
from gracile.surgery import apply, edit_from_json, edit_to_json


def traced(name: str) -> tuple[nn.Module, Trace]:
    model = ZOO[name]()
    batch = example_for(model)
    return model, trace(model, lambda m: m(batch))


def test_indices_and_attributes_of_a_small_mlp() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    edit = plan_resize(trace(model, lambda m: m(torch.randn(2, 3))), {"0": [0, 3]})
    assert edit.keep == dict.fromkeys(("0.weight:0", "0.bias:0", "1.weight:0", "1.bias:0", "2.weight:1"), (0, 3))
    assert edit.attributes == {"0.out_features": 2, "1.normalized_shape": (2,), "2.in_features": 2}


def test_attributes_of_users_modules_and_of_grouped_convolutions() -> None:
    _, found = traced("AttentionEncoder")
    edit = plan_resize(found, {"attention:heads": [0, 2, 3]})
    assert edit.attributes["attention.heads"] == 3
    assert "attention.head_dim" not in edit.attributes
    assert edit.attributes["attention.out.in_features"] == 18
    _, found = traced("Depthwise")
    edit = plan_resize(found, {"expand": list(range(20))})
    assert edit.attributes["depth.groups"] == edit.attributes["depth.in_channels"] == 20
    assert edit.attributes["project.in_channels"] == 20


def test_several_groups_on_one_axis_are_cut_together() -> None:
    _, found = traced("AttentionEncoder")
    edit = plan_resize(found, {"attention:heads": [1, 3], "attention:head_dim": [0, 5], "attention:head_dim#2": [2, 3]})
    assert edit.keep["attention.q.weight:0"] == (6, 11, 18, 23)
    assert edit.keep["attention.v.bias:0"] == (8, 9, 20, 21)
    assert (edit.attributes["attention.heads"], edit.attributes["attention.head_dim"]) == (2, 2)


def test_keeping_all_units_changes_nothing() -> None:
    _, found = traced("MLP")
    edit = plan_resize(found, {"fc1": list(range(16))})
    assert not edit.keep
    assert not edit.attributes


def test_an_edit_survives_json_and_applies_to_a_fresh_model() -> None:
    model, found = traced("GroupedQuery")
    edit = plan_resize(found, {"qkv:heads": [1], "gate": list(range(0, 32, 2))})
    once, again = copy.deepcopy(model), ZOO["GroupedQuery"]()
    apply(once, [edit])
    apply(again, [edit_from_json(edit_to_json(edit))])
    batch = example_for(model)
    assert torch.equal(once(batch), again(batch))


def test_macs_of_a_cut_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1))
    found = trace(model, lambda m: m(torch.randn(2, 3, 5, 5)))
    assert found.macs == 25 * (27 * 8 + 9 * 8 + 8 * 4)
    assert cut_macs(found, {"0": [0, 1, 2, 3, 4]}) == 25 * (27 * 5 + 9 * 5 + 5 * 4)
    assert cut_macs(found, {}) == found.macs


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": [0]}, "no group 'nothing'"),
        ({"head": [0]}, "'head' cannot be cut: it reaches the model's output"),
        ({"fc1": []}, "would keep none of its 40 units"),
        ({"fc1": [3, 1]}, "ascending, different"),
        ({"fc1": [1, 1]}, "ascending, different"),
        ({"fc1": [0, 40]}, r"within 0 … 39"),
        ({"fc1": [-1, 2]}, r"within 0 … 39"),
        ({"attention:head_dim": [0, 1], "attention:head_dim#2": [0]}, r"same number of units\s+\(attention.head_dim"),
        ({"attention:head_dim": [0, 1]}, r"'attention:head_dim#2' must keep as many units"),
    ],
)
def test_what_cannot_be_done_is_refused(keep: dict[str, list[int]], message: str) -> None:
    _, found = traced("AttentionEncoder")
    with pytest.raises(ConfigError, match=message):
        plan_resize(found, keep)
