"""Recipes as JSON: every step comes back equal, through text; and what is no recipe is explained."""

from __future__ import annotations

import json

import pytest

import gracile as gc
from gracile.config import to_config
from gracile.recipe_json import recipe_from_json, scheme_named

STEPS = [
    gc.Prune(0.3),
    gc.Prune(below=1e-3, criterion=gc.Magnitude(power=2.0)),
    gc.Prune(to=gc.MACs(0.5), pattern=gc.Channels(multiple_of=8, normalise=False), criterion=gc.Taylor()),
    gc.Prune(to=gc.Parameters(20000), pattern=gc.Heads(), criterion=gc.Gradient(), correct=False),
    gc.Prune(to=gc.Bytes(0.25), pattern=gc.Channels(), criterion=gc.Hessian(hutchinson_probes=4), exclude=("head", "a.*")),  # noqa: E501
    gc.Prune(to=gc.Latency(0.4, target=gc.OpenVINO(threads=2, precision="bf16")), pattern=gc.Channels()),
    gc.Prune(to=gc.Latency(2.5, target=gc.OnnxRuntime(), ms=True), pattern=gc.Channels(), examples=17),
    gc.Prune(to=gc.Latency(0.5, target=gc.PyTorch(threads=1)), pattern=gc.Channels()),
    gc.Prune(pattern=gc.NM(2, 4), criterion=gc.criteria.Random(seed=3)),
    gc.Prune(0.5, allocation=gc.allocate.Uniform()),
    gc.Prune(0.2, pattern=gc.Layers(examples=64), exclude=("blocks.0",)),
    gc.Prune(to=gc.MACs(0.5), pattern=gc.Layers(), repair=gc.solvers.LeastSquares()),
    gc.Prune(to=gc.Bytes(0.5), pattern=(gc.Channels(), gc.Heads(), gc.Layers(candidates=2))),
    gc.Prune(0.5, pattern=gc.Channels(), criterion=gc.criteria.BatchNormScale()),
    gc.Prune(0.5, pattern=gc.Channels(), criterion=gc.criteria.Activation(power=2)),
    gc.Prune(0.5, pattern=gc.Channels(), criterion=gc.criteria.FPGM()),
    gc.Prune(0.5, pattern=gc.Heads(), criterion=gc.criteria.GateFisher(), examples=64),
    gc.Prune(0.5, pattern=gc.Channels(), criterion=gc.criteria.OBS(damping=0.1, swap_sweeps=0), allocation=gc.allocate.MeasuredLoss(power=1.0, levels=4)),  # noqa: E501
    gc.Prune(0.5, pattern=gc.Channels(), repair=gc.solvers.LeastSquares()),
    gc.Prune(to=gc.MACs(0.5), pattern=(gc.Channels(multiple_of=4), gc.Heads()), criterion=gc.criteria.OBS(rounds=9)),
    gc.Prune(0.5, allocation=gc.allocate.GlobalRank(max_fraction=0.9, per_cost=True)),
    gc.Factorize(0.3, solver=gc.solvers.LowRank(damping=0.1), levels=3, exclude=("head",)),
    gc.Factorize(0.3, spatial=gc.solvers.SpatialLowRank(damping=0.1, sweeps=1, steps=3)),
    gc.Factorize(0.3, spatial=None),
    gc.Factorize(to=gc.Latency(0.5, target=gc.OnnxRuntime()), power=1, multiple_of=8, correct=False),
    gc.Quantize(gc.W8A8),
    gc.Quantize(gc.W4A8, solver=gc.solvers.GPTQ(order="given", beam=2, polish=1, rounds=2, damping=0.1, asymmetry=0.25, block=32)),  # noqa: E501
    gc.Quantize(gc.W8A8, equalize=gc.equalize.CrossLayer(sweeps=5, tolerance=0.1)),
    gc.Quantize(to=gc.Bytes(0.2), options=(gc.W8A8, gc.W4A8, gc.Int(2))),
    gc.Quantize(gc.formats.W8A8Dynamic),
    gc.Quantize(gc.W8A16, ranges=gc.ranges.MinMax()),
    gc.Quantize(gc.W8A8, ranges=gc.ranges.Entropy(thresholds=32)),
    gc.Quantize(gc.W8A8, ranges=gc.ranges.Automatic((gc.ranges.MinMax(), gc.ranges.MSE(thresholds=9)), batches=3)),
    gc.Quantize(gc.W8A8, ranges=gc.ranges.MovingAverage(rate=0.1)),
    gc.Quantize(gc.W8A8, equalize=gc.equalize.SmoothQuant(alphas=(0.5, 0.7), minimum_gain=1.5)),
    gc.Quantize(gc.W4A16(group=8), equalize=gc.equalize.AWQ(alphas=(0.5,)), solver=gc.solvers.GPTQ(beam=2)),
    gc.Quantize(gc.W4A4, solver=gc.solvers.AdaRound(iterations=10, start=gc.solvers.GPTQ(asymmetry=1.0))),
    gc.Quantize(gc.W4A4, solver=gc.solvers.AdaRound(drop=0.0, start=None)),
    gc.Quantize(gc.W4A4, solver=gc.solvers.SignRound(iterations=20, start=gc.solvers.GPTQ(polish=0))),
    gc.Quantize(gc.W4A16(group=32), ranges=gc.ranges.MSE(thresholds=64, power=2.4), exclude=("stem",)),
    gc.Quantize(gc.Int(bits=4, symmetric=False), ranges=gc.ranges.Percentile(99.9), correct=False),
    gc.Quantize(gc.Int(3, gc.formats.PerTensor())),
    gc.Quantize(gc.FixedPoint(factor=256)),
    gc.Quantize(gc.formats.NF4(gc.formats.PerGroup(32)), solver=gc.solvers.GPTQ()),
    gc.Quantize(gc.formats.FP4(gc.formats.PerChannel(0))),
    gc.only("a", gc.Quantize(gc.formats.FP8("e5m2"))),
    gc.only("b", gc.Quantize(gc.formats.MXFP4())),
    gc.only("d", gc.Quantize(gc.formats.NVFP4())),
    gc.only("e", gc.Quantize(gc.formats.PowersOfTwo(5, gc.formats.PerTensor()))),
    gc.only("f", gc.Quantize(gc.formats.Codebook(2))),
    gc.only("c", gc.Quantize(gc.formats.Ternary())),
    gc.Quantize(to=gc.Latency(0.6, target=gc.OnnxRuntime()), options=(None, gc.W8A8)),
    gc.only("r", gc.Quantize(gc.formats.MidRise(3))),
    gc.only("g", gc.Quantize(gc.formats.Binary(gc.formats.PerGroup(16)))),
    gc.Quantize(gc.Scheme("own", gc.Int(5, gc.formats.PerChannel(1)), gc.Int(7, gc.formats.PerTensor()))),
    gc.Distill(),
    gc.Distill(losses=(gc.losses.Hint(), gc.losses.Hint(("a.*", "b"), weight=0.5)), mixup=0.5),
    gc.Distill(
        losses=(gc.SoftLabels(temperature=2.5), gc.HardLabels(), gc.losses.CosineDistance(), gc.losses.MeanSquaredError()),  # noqa: E501
        epochs=3, label_weight=0.25, optimizer=gc.steps.SGD(learning_rate=0.1), held_out=0.1, mixed_precision=True,
    ),
    gc.Finetune(epochs=2, optimizer=gc.steps.AdamW(learning_rate=1e-3, weight_decay=0.0)),
    gc.only("blocks.*", gc.Prune(0.3)),
    gc.only(("a", "b.*"), gc.Recipe(gc.Prune(0.3), gc.only("c", gc.Quantize(gc.W8A8)))),
    gc.Recipe(gc.Prune(0.3), gc.Distill(epochs=2), gc.Recipe(gc.Finetune(), gc.Quantize(gc.W4A16()))),
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_a_step_comes_back_exactly(step):
    text = json.dumps(to_config(step))
    found = recipe_from_json(json.loads(text))
    assert found == step
    assert type(found) is type(step)
    assert json.dumps(to_config(found)) == text


def test_every_public_member_of_every_family_is_in_a_step_above():
    """A new criterion, loss, range or format joins the round trip, or this says so."""
    text = json.dumps([to_config(step) for step in STEPS])
    for family, settings in (
        (gc.criteria, {"Criterion", "Consumer", "UnitCriterion", "Units", "CannotScoreError"}),
        (gc.losses, {"DistillationLoss"}),
        (gc.ranges, {"Range"}),
        (gc.formats, {"Format", "Granularity", "Levels"}),
        (gc.solvers, {"Moments", "Grid", "Rounded", "RoundingProblem", "RoundingSolver", "BlockSolver"}),
        (gc.equalize, {"InputScales"}),
        (gc.targets, {"Target", "Capabilities", "Runner", "Outputs"}),
    ):
        for name in set(family.__all__) - settings:
            if isinstance(getattr(family, name), type):
                assert f'"type": "{name}"' in text, f"{family.__name__}.{name}"


def test_a_list_is_a_recipe_and_a_scheme_may_be_named():
    found = recipe_from_json([{"type": "Prune", "fraction": 0.3}, {"type": "Quantize", "scheme": "w4a16:64"}])
    assert found == gc.Recipe(gc.Prune(0.3), gc.Quantize(gc.W4A16(64)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a8", gc.W8A8),
        ("W8A16", gc.W8A16),
        ("w7a8", gc.formats.W7A8),
        ("W8A8-dynamic", gc.formats.W8A8Dynamic),
        ("w3a3", gc.W3A3),
        ("w2a16:64", gc.formats.W2A16(64)),
        ("w4a16", gc.W4A16(128)),
        ("w4a16:32", gc.W4A16(32)),
        ("int2", gc.Int(2)),
        ("int8", gc.Int(8)),
        ("fixed:256", gc.FixedPoint(256)),
        ("fixed:0.5", gc.FixedPoint(0.5)),
    ],
)
def test_short_names_of_formats(name, expected):
    assert scheme_named(name) == expected


@pytest.mark.parametrize(
    "name", ["", "w5a5", "w3a3:8", "int9", "int1", "w4a16:", "w4a16:x", "w4a16:0", "w8a8:32", "fixed", "fixed:"]
)
def test_other_names_are_refused_with_those_there_are(name):
    if name == "w4a16:":
        assert scheme_named(name) == gc.W4A16(128)  # an empty amount is none
        return
    with pytest.raises(gc.ConfigError, match=r"w8a8, .*w4a16\[:group\], .*int2"):
        scheme_named(name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"type": "Squeeze"}, "Unknown type 'Squeeze'"),
        ({"type": ["Prune"]}, "Unknown type"),
        ({"type": "Prune", "amount": 0.3}, "amount"),
        ({"type": "Prune", "fraction": 1.5}, "below 1"),
        ({"type": "Prune", "fraction": "a third"}, "fraction"),
        ({"type": "Quantize"}, "scheme"),
        ({"type": "Quantize", "scheme": "w5a5"}, "not a number format"),
        ({"type": "Quantize", "scheme": {"callable": "os:system"}}, "cannot carry the function os:system"),
        ({"type": "Recipe", "steps": 3}, "Recipe"),
        ({"type": "Recipe", "steps": []}, "no steps"),
        ({"type": "Only", "patterns": [], "step": {"type": "Finetune"}}, "pattern"),
        ({"type": "Magnitude"}, "a 'type'"),
        ({"fraction": 0.3}, "a 'type'"),
        ([0.3], "not a step"),
        ("Prune", "a 'type'"),
        (None, "a 'type'"),
    ],
)
def test_what_is_no_recipe_is_explained(config, said):
    with pytest.raises(gc.ConfigError, match=said):
        recipe_from_json(config)
