from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracile.errors import ArtifactError
from gracile.formats import Int, PerChannel, format_to_config
from gracile.surgery import Remove, Resize, Swap, apply, edit_from_json, edit_to_json

INT8 = {"weight": format_to_config(Int(8, PerChannel(0))), "input": None, "output": None}


class Holder(nn.Module):
    """A module with everything that an edit may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.second.weight = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        self.register_buffer("scale", torch.arange(6.0))
        self.register_buffer("order", torch.arange(6), persistent=False)
        self.splits, self.shape = [2, 4], (6, 1)
        self.config = SimpleNamespace(hidden=6, name="x", rate=0.5, nested=[SimpleNamespace(size=6)])
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)) * self.scale * self.order)
        return y


KEPT = (0, 2, 5)
CUT = Resize(
    {"first.weight:0": KEPT, "first.bias:0": KEPT, "second.weight:1": KEPT, "scale:0": KEPT, "order:0": KEPT},
    {
        "first.out_features": 3,
        "second.in_features": 3,
        "splits": (1, 2),
        "shape": (3, 1),
        "config.hidden": 3,
        "config.nested.0.size": 3,
    },
)


def test_a_resize_takes_the_same_units_from_parameters_buffers_and_attributes() -> None:
    net, x = Holder(), torch.randn(5, 4)
    first, second = net.first.weight.detach(), net.second.weight.detach()
    with torch.no_grad():
        hidden = torch.relu(net.first(x)) * net.scale * net.order
        expected = hidden[:, KEPT] @ second[:, KEPT].T + net.second.bias
    apply(net, [CUT])
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    assert torch.equal(net.first.weight, first[list(KEPT)])
    assert net.scale.tolist() == [0, 2, 5] and net.order.tolist() == [0, 2, 5] and net.order.dtype == torch.int64
    assert "order" not in net.state_dict() and "scale" in net.state_dict()
    assert net.first.out_features == net.second.in_features == net.config.hidden == net.config.nested[0].size == 3
    assert net.splits == [1, 2] and isinstance(net.splits, list)
    assert net.shape == (3, 1) and isinstance(net.shape, tuple)
    assert isinstance(net.second.weight, nn.Parameter) and not net.second.weight.requires_grad
    assert net.first.weight.requires_grad and net.first.weight.is_leaf and net.second.weight.is_contiguous()


class TiedNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("names", [["embed"], ["head"], ["embed", "head"]], ids=str)
def test_a_tied_tensor_is_cut_once_and_stays_tied_whichever_names_are_given(names: list[str]) -> None:
    net = TiedNames()
    before = net.embed.weight.detach().clone()
    apply(net, [Resize({f"{name}.weight:1": (1, 3, 4, 5) for name in names})])
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.embed.weight, before[:, [1, 3, 4, 5]])
    apply(net, [Resize({f"{name}.weight:1": (0, 3) for name in names})])
    assert torch.equal(net.embed.weight, before[:, [1, 5]]) and net.head.weight is net.embed.weight


def test_both_axes_of_one_tensor() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    before = net[0].weight.detach().clone()
    apply(net, [Resize({"0.weight:0": (0, 3), "0.weight:1": (1, 2, 3)})])
    assert torch.equal(net[0].weight, before[[0, 3]][:, [1, 2, 3]])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_recurrent_layer_computes_with_the_cut_weights(kind: Any, bidirectional: bool) -> None:
    """Against a layer built at the small size and given hand-sliced weights."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": True}
    net, small = nn.Sequential(kind(3, 5, **options)), kind(3, 2, **options)
    kept = [1, 4]
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    rows = [g * 5 + u for g in range(gates) for u in kept]
    both = kept + [5 + u for u in kept] if bidirectional else kept
    keep: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        for name, p in net[0].named_parameters():
            sliced = p[rows]
            keep[f"0.{name}:0"] = tuple(rows)
            if "weight_hh" in name:
                sliced, keep[f"0.{name}:1"] = sliced[:, kept], tuple(kept)
            elif "weight_ih_l1" in name:
                sliced, keep[f"0.{name}:1"] = sliced[:, both], tuple(both)
            getattr(small, name).copy_(sliced)
    x = torch.randn(2, 7, 3)
    net(x)  # the list of flat weights is in use
    apply(net, [Resize(keep, {"0.hidden_size": 2})])
    with torch.no_grad():
        assert torch.equal(net(x)[0], small(x)[0])
        net[0].weight_hh_l0.zero_()  # what it computes with is the parameter, not a copy of it
        assert not torch.equal(net(x)[0], small(x)[0])


class Sharing(nn.Module):
    """One layer under four names: twice in one parent, once in another, once in a list."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        self.a, self.b, self.inner, self.many = layer, layer, nn.Sequential(layer), nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.many[0](self.inner(self.b(self.a(x))))
        return y


@pytest.mark.parametrize("name", ["a", "b", "inner.0", "many.0"])
def test_a_shared_layer_is_swapped_wherever_it_is_held(name: str) -> None:
    net = Sharing().eval()
    apply(net, [Swap(name, "QuantizedLinear", INT8)])
    layers = {id(m): type(m).__name__ for m in (net.a, net.b, net.inner[0], net.many[0])}
    assert list(layers.values()) == ["QuantizedLinear"]
    assert not net.a.training


def test_a_layer_held_twice_by_a_sequence_is_swapped_in_both_places() -> None:
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    apply(net, [Swap("2", "Identity")])
    assert [type(m).__name__ for m in net] == ["Identity", "ReLU", "Identity"]
    assert net[0] is net[2]


def test_edits_are_applied_in_order() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    apply(
        net,
        [Resize({"0.weight:0": (0, 2), "0.bias:0": (0, 2)}), Swap("1", "Identity"), Swap("0", "QuantizedLinear", INT8)],
    )
    assert net[0].out_features == 2 and isinstance(net[1], nn.Identity)


@pytest.mark.parametrize(
    "edit", [CUT, Swap("a.b", "QuantizedConv", {**INT8, "bias": True}), Swap("n", "Identity"), Resize({})]
)
def test_edits_survive_json(edit: Any) -> None:
    assert edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) == edit


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "Swap",
        {},
        {"edit": "Exec", "code": "1"},
        {"edit": "Swap", "name": "a"},
        {"edit": "Swap", "name": "a", "layer": "b", "config": 3},
        {"edit": "Resize", "keep": [], "attributes": {}},
        {"edit": "Resize", "keep": {"w:0": 3}, "attributes": {}},
        {"edit": "Resize", "keep": {"w:0": ["x"]}, "attributes": {}},
        {"edit": "Resize", "keep": {"w:0": [float("inf")]}, "attributes": {}},
        {"edit": "Resize", "keep": {"w:0": [float("nan")]}, "attributes": {}},
        {"edit": "Resize", "keep": {}, "attributes": {"a": None}},
        {"edit": "Resize", "keep": {}, "attributes": {"a": {}}},
        {"edit": ["Swap"]},
    ],
    ids=str,
)
def test_json_that_is_no_edit_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError):
        edit_from_json(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Resize({"first.nothing:0": (0,)}), "no parameter 'first.nothing'"),
        (Resize({"nowhere.weight:0": (0,)}), "no parameter 'nowhere.weight'"),
        (Resize({"weight": (0,)}), "no parameter"),
        (Resize({"forward:0": (0,)}), "no parameter 'forward'"),
        (Resize({"splits:0": (0,)}), "no parameter 'splits'"),
        (Resize({"first.weight:x": (0,)}), "and its axis"),
        (Resize({"first.weight:-1": (0,)}), "and its axis"),
        (Resize({"first.weight:2": (0,)}), r"\(6, 4\), so axis 2"),
        (Resize({"first.weight:0": (6,)}), "cannot keep indices 6 to 6"),
        (Resize({"first.weight:0": (-1, 2)}), "cannot keep indices -1 to 2"),
        (Resize({"first.weight:0": ()}), "cannot keep no index at all"),
        (Resize({}, {"first.nothing": 1}), "no attribute 'first.nothing'"),
        (Resize({}, {"config.nested.7.size": 1}), "no attribute"),
        (Resize({}, {"config.nested.x.size": 1}), "no attribute"),
        (Resize({}, {"config.name": 1}), "not an integer"),
        (Resize({}, {"config.rate": 1}), "not an integer"),
        (Resize({}, {"flag": 0}), "not an integer"),
        (Resize({}, {"training": 0}), "not an integer"),
        (Resize({}, {"forward": 1}), "not an integer"),
        (Resize({}, {"first": 1}), "not an integer"),
        (Resize({}, {"config.nested": (1,)}), "not an integer"),
        (Resize({}, {"__class__": 1}), "can be resized"),
        (Resize({}, {"forward.__func__.__code__.co_argcount": 1}), "can be resized"),
        (Resize({}, {"first.__dict__.x": 1}), "can be resized"),
        (Swap("nowhere", "Identity"), "no layer 'nowhere'"),
        (Swap("", "Identity"), "the model itself"),
        (Swap("first", "Linear"), "'Linear' is not a layer of this version"),
        (Swap("first", "QuantizedLinear", {}), "cannot stand for a Linear"),
        (Swap("config", "Identity"), "no layer 'config'"),
    ],
    ids=str,
)
def test_edits_that_do_not_fit_the_model_are_refused(edit: Any, message: str) -> None:
    net = Holder()
    with pytest.raises(ArtifactError, match=message) as caught:
        apply(net, [edit])
    assert len(str(caught.value).splitlines()) <= 3
    assert net.flag is True and net.training is True and net.config.name == "x"


class Chains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbered = nn.ModuleList(nn.Linear(2, n) for n in (1, 2, 3, 4))
        self.named = nn.Sequential()
        for name in ("a", "b", "c"):
            self.named.add_module(name, nn.Linear(2, 2))
        self.alone = nn.Linear(2, 2)


def test_a_module_is_removed_and_those_behind_it_move_up_where_they_are_numbered() -> None:
    net = Chains()
    left = [net.numbered[i] for i in (0, 3)]
    edits = [Remove("numbered.2"), Remove("numbered.1"), Remove("named.b")]
    apply(net, [edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) for edit in edits])
    assert [m is n for m, n in zip(net.numbered, left, strict=True)] == [True, True]
    assert net.numbered[1].out_features == 4 and len(net.numbered) == 2
    assert [name for name, _ in net.named.named_children()] == ["a", "c"]
    assert {name.rpartition(".")[0] for name in net.state_dict()} == {
        *("numbered.0", "numbered.1", "named.a", "named.c", "alone")
    }


@pytest.mark.parametrize("name", ["numbered.9", "alone", "missing.0", "", "named.d"])
def test_what_is_in_no_list_or_sequence_is_not_removed(name: str) -> None:
    net = Chains()
    with pytest.raises(ArtifactError, match="Remove"):
        apply(net, [Remove(name)])
    assert len(net.numbered) == 4 and len(net.named) == 3
