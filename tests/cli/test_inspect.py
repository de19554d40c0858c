"""gracile inspect on a net small enough to count by hand."""

from __future__ import annotations

#: conv 8·1·9 + 8, norm 2·8, hidden 16·8 + 16, head 3·16 + 3.
PARAMETERS = 80 + 16 + 144 + 51
#: conv 8·9 at 36 positions, hidden 8·16, head 16·3; a batch norm multiplies nothing that is counted.
MACS = 72 * 36 + 128 + 48


def test_counts_match_those_by_hand(run_json):
    found = run_json("inspect", "shop:make_net", "--data", "shop:make_data")
    assert (found["parameters"], found["macs"], found["model"]) == (PARAMETERS, MACS, "Net")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert list(layers) == ["conv", "norm", "hidden", "head"]
    assert layers["conv"]["input_shape"] == [16, 1, 6, 6]
    assert layers["conv"]["output_shape"] == [16, 8, 6, 6]
    assert layers["hidden"]["macs"] == 128


def test_groups_say_what_is_tied_and_what_is_frozen(run_json):
    found = run_json("inspect", "shop:make_net", "--data", "shop:make_data")
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["conv"]["units"] == 8
    assert {"conv.weight[0]", "norm.running_mean[0]"} <= set(groups["conv"]["producers"])
    assert groups["conv"]["consumers"] == ["hidden.weight[1]"]
    assert groups["head"]["frozen"]
    assert groups["hidden"]["frozen"] is None


def test_the_table_shows_the_same_for_a_person(run):
    shown = run("inspect", "shop:make_net", "--data", "shop:make_data").stdout
    for text in ("hidden", "16 × 8 × 6 × 6", "Units that can be cut", "Frozen, and why", "head"):
        assert text in shown


def test_without_data_it_shows_layers_and_says_what_data_would_add(run, run_json):
    found = run_json("inspect", "shop:make_net")
    assert found["parameters"] == PARAMETERS
    assert found["macs"] is None
    assert found["groups"] == []
    assert "pass --data" in run("inspect", "shop:make_net").stderr


def test_quantized_layers_count_the_weights_that_they_encode(run, run_json):
    run("compress", "shop:make_net", "--quantize", "int4", "--out", "slim")
    found = run_json("inspect", "slim")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["hidden"]["kind"] == "QuantizedLinear"
    assert layers["hidden"]["parameters"] == 144
    assert found["parameters"] == PARAMETERS


def test_json_may_be_asked_for_before_the_command(run):
    first = run("--json", "inspect", "shop:make_net").stdout
    assert first == run("inspect", "shop:make_net", "--json").stdout
    assert first.startswith("{")


def test_sensitivity_of_every_layer_in_every_scheme(run, run_json):
    found = run_json("inspect", "shop:make_net", "--data", "shop:make_data", "--sensitivity", "w8a8,w2a8")
    assert found["schemes"] == ["W8A8", "W2A8"]
    assert [layer["name"] for layer in found["layers"]] == ["conv", "hidden", "head"]
    assert all(layer["losses"][0] < layer["losses"][1] for layer in found["layers"])
    shown = run("inspect", "shop:make_net", "--data", "shop:make_data", "--sensitivity", "w8a8,w2a8").stdout
    assert "hidden" in shown and "█" in shown


def test_sensitivity_says_what_it_lacks(run):
    assert "pass --data" in run("inspect", "shop:make_net", "--sensitivity", "w8a8,w2a8", code=2).stderr
    asked = run("inspect", "shop:make_net", "--data", "shop:make_data", "--sensitivity", "w8a8", code=2)
    assert "two schemes" in asked.stderr
