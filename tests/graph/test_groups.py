"""Members and their positions against layouts written out by hand."""

from __future__ import annotations

import torch
from nets import ZOO, example_for
from torch import Tensor, nn

from gracile.graph import Group, Trace, trace


def traced(name: str) -> Trace:
    model = ZOO[name]()
    batch = example_for(model)
    return trace(model, lambda m: m(*batch) if isinstance(batch, tuple) else m(batch))


def positions(group: Group, tensor: str, axis: int) -> list[list[int]]:
    (member,) = [m for m in group.members if (m.tensor, m.axis) == (tensor, axis)]
    return member.positions.tolist()


def test_the_residual_stream_of_padded_shortcuts_is_one_unit_set_inside_the_padding() -> None:
    stream = traced("PadShortcut").group("conv1")
    assert positions(stream, "conv1.weight", 0) == [[i] for i in range(8)]
    assert positions(stream, "blocks.2.conv2.weight", 0) == [[4 + i] for i in range(8)]  # 4 of padding, 8, 4
    assert positions(stream, "linear.weight", 1) == [[12 + i] for i in range(8)]  # 8 + 4 of padding, 8, 4 + 8


def test_a_channel_is_nine_inputs_after_flattening() -> None:
    channel = traced("FlattenConv").group("body.0")
    assert positions(channel, "head.0.weight", 1) == [list(range(9 * i, 9 * i + 9)) for i in range(8)]


def test_heads_of_a_packed_grouped_query_projection() -> None:
    """qkv rows: 4 query heads of 6 (two per key head), 2 key heads of 6, 2 value heads of 6."""
    heads = traced("GroupedQuery").group("qkv:heads")
    expected = [
        [*range(12 * i, 12 * i + 12), *range(24 + 6 * i, 30 + 6 * i), *range(36 + 6 * i, 42 + 6 * i)] for i in (0, 1)
    ]
    assert positions(heads, "qkv.weight", 0) == expected
    assert positions(heads, "out.weight", 1) == [list(range(12)), list(range(12, 24))]


def test_a_dense_net_shifts_later_features() -> None:
    found = traced("Dense")
    assert positions(found.group("convs.1"), "fc.weight", 1) == [[12 + i] for i in range(4)]
    assert positions(found.group("convs.1"), "convs.2.weight", 1) == [[12 + i] for i in range(4)]


def test_hidden_units_of_a_recurrent_layer_sit_in_every_gate_and_in_what_reads_their_direction() -> None:
    hidden = traced("BiLSTM").group("lstm:hidden#2")  # of the first layer, backwards
    assert hidden.kind == "hidden"
    gates = [[i + 8 * gate for gate in range(4)] for i in range(8)]
    for name in ("weight_ih_l0_reverse", "weight_hh_l0_reverse", "bias_ih_l0_reverse"):
        assert positions(hidden, f"lstm.{name}", 0) == gates
    for name in ("weight_ih_l1", "weight_ih_l1_reverse"):
        assert positions(hidden, f"lstm.{name}", 1) == [[8 + i] for i in range(8)]
    last = traced("BiLSTM").group("lstm:hidden#4")
    assert positions(last, "fc.weight", 1) == [[8 + i] for i in range(8)]


def test_roles_tell_what_a_product_sums_over() -> None:
    roles = {(m.tensor, m.axis): m.role for m in traced("PlainConv").group("conv1").members}
    producers = ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    assert roles == {**{(name, 0): "producer" for name in producers}, ("conv2.weight", 1): "consumer"}


def test_a_tied_embedding_is_one_tensor_that_consumes() -> None:
    members = {(m.tensor, m.axis): m.role for m in traced("TiedEmbedding").group("embed").members}
    assert members[("embed.weight", 1)] == "consumer"
    assert not any(tensor == "decoder.weight" for tensor, _ in members)


def test_kinds_and_names_of_attention() -> None:
    groups = {g.name: g.kind for g in traced("AttentionEncoder").groups if g.frozen is None}
    assert groups == {
        "embed": "channels",
        "attention:heads": "heads",
        "attention:head_dim": "head_dim",
        "attention:head_dim#2": "head_dim",
        "fc1": "channels",
    }


def test_two_axes_sized_by_one_attribute_share_a_count() -> None:
    found = traced("AttentionEncoder")
    query, value = found.group("attention:head_dim"), found.group("attention:head_dim#2")
    assert query.tied_count == value.tied_count == "attention.head_dim"
    assert found.group("attention:heads").tied_count is None


def test_halves_by_chunk_that_are_not_multiplied_share_a_count() -> None:
    found = traced("Shuffle")
    assert found.group("stem").tied_count is not None
    assert found.group("stem").tied_count == found.group("stem#2").tied_count


def test_inexact_groups_say_what_runs_over_them() -> None:
    assert traced("PatchMixer").group("patch").exact == "a layer norm is taken over it"
    assert traced("GroupNormNet").group("stem").exact == "a group norm is taken over it"
    assert traced("GroupedQuery").group("embed").exact == "'mean' is taken over it"
    assert traced("PadShortcut").group("conv1").exact is None


def test_what_a_scale_depends_on_is_frozen() -> None:
    head_size = traced("PackedQKV").group("qkv:head_dim")
    assert head_size.frozen == "attention divides its scores by the square root of this size"


def test_a_number_written_in_the_forward_is_named() -> None:
    conv = traced("Literals").group("conv")
    assert conv.frozen == "the forward fixes a size that depends on it to the number 72 (view in the model)"


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.spare = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def test_parameters_that_did_not_run_are_never_cut() -> None:
    found = trace(Unused(), lambda m: m(torch.randn(2, 4)))
    assert [g.name for g in found.groups if g.frozen is None] == ["fc1"]
    assert not any(m.tensor.startswith("spare") for g in found.groups if g.frozen is None for m in g.members)
