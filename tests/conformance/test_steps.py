"""What every step must satisfy, on a perceptron, a convolutional net and a transformer with a tied embedding. A new
step joins by one row of MEMBERS."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gracile as gc
from gracile.config import to_config
from gracile.context import Context
from gracile.nn import QuantizedLayer
from gracile.recipe import Step
from gracile.recipe_json import recipe_from_json
from gracile.report.model import StepRecord
from gracile.steps import AdamW
from gracile.surgery import apply


class Transformer(nets.TokenNet):
    """One block of attention and a gated perceptron; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(self.vocabulary, self.dim), nn.LayerNorm(self.dim)
        self.attention = nets.SelfAttention(self.dim, 4, 6)
        self.up, self.gate, self.down = nn.Linear(self.dim, 20), nn.Linear(self.dim, 20), nn.Linear(20, self.dim)
        self.head = nn.Linear(self.dim, self.vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        out: Tensor = self.head(x).mean(1)
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": nets.MLP,
    "convolutional": nets.PlainConv,
    "transformer": Transformer,
}


@dataclass(frozen=True)
class Member:
    step: Step
    keeps_shapes: bool = True
    keeps_floats: bool = True  # weights stay parameters
    random: bool = False  # the seed decides something
    models: tuple[str, ...] = tuple(MODELS)
    quantizes_inputs: bool = False


#: A sweep or two, as the time of all these tests counts.
QUICK = gc.solvers.GPTQ(beam=2, polish=1, rounds=1)

MEMBERS = [
    Member(gc.Prune(0.4)),
    Member(gc.Prune(below=0.05, correct=False)),
    Member(gc.Prune(pattern=gc.NM(2, 4))),
    Member(gc.Prune(0.4, criterion=gc.Taylor(), examples=8)),
    Member(gc.Prune(0.4, criterion=gc.Hessian(hutchinson_probes=1), examples=8), random=True),
    Member(gc.Prune(0.3, pattern=gc.Channels()), keeps_shapes=False),
    Member(gc.Prune(to=gc.MACs(0.7), pattern=gc.Channels()), keeps_shapes=False),
    Member(gc.Prune(0.25, pattern=gc.Heads()), keeps_shapes=False, models=("transformer",)),
    Member(gc.Factorize(0.3), keeps_shapes=False),
    Member(gc.Factorize(to=gc.MACs(0.7), correct=False), keeps_shapes=False),
    Member(gc.Quantize(gc.W8A8), keeps_floats=False, quantizes_inputs=True),
    Member(gc.Quantize(gc.W4A4, solver=QUICK), keeps_floats=False, quantizes_inputs=True),
    Member(gc.Quantize(gc.W4A16(group=8), solver=QUICK), keeps_floats=False),
    Member(gc.Quantize(to=gc.Bytes(0.6), options=(gc.Int(8), gc.Int(4))), keeps_floats=False),
    Member(gc.Quantize(gc.W8A16, ranges=gc.ranges.MinMax()), keeps_floats=False),
    Member(gc.Quantize(gc.Int(4)), keeps_floats=False),
    Member(gc.Quantize(gc.FixedPoint(factor=256)), keeps_floats=False),
    Member(gc.Distill(epochs=2, optimizer=AdamW(5e-3), held_out=0.25), random=True),
    Member(gc.Finetune(epochs=2, optimizer=AdamW(5e-3), held_out=0.25), random=True),
    Member(gc.Iterative(gc.Prune(0.4), gc.Distill(optimizer=AdamW(5e-3), held_out=0.25), rounds=2), random=True),
    Member(
        gc.Gradual(
            gc.Prune(0.4, pattern=gc.Channels()), gc.Distill(epochs=4, optimizer=AdamW(5e-3), held_out=0.25), rounds=2
        ),
        keeps_shapes=False,
        random=True,
    ),
]
CASES = [(member, model) for member in MEMBERS for model in member.models]
each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.step.title)
each_case = pytest.mark.parametrize(("member", "name"), CASES, ids=[f"{m.step.title}-{n}" for m, n in CASES])


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = MODELS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net.eval()


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(4):
        if name == "transformer":
            x = torch.randint(0, Transformer.vocabulary, (6, Transformer.length), generator=generator)
        else:
            shape = nets.MLP.shape if name == "perceptron" else nets.PlainConv.shape
            x = torch.randn(6, *shape, generator=generator)
        found.append((x, torch.randint(0, 4, (6,), generator=generator)))
    return found


def context(name: str, model: nn.Module, seed: int = 0) -> Context:
    labelled = batches(name)
    teacher = make(name, seed=9)
    data = gc.Data(calibration=[x for x, _ in labelled], train=labelled, loss=gc.losses.cross_entropy)
    return Context(data, copy.deepcopy(model), teacher, seed=seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def outputs(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches(name)])


def run(member: Member, name: str, model: nn.Module, seed: int = 0) -> StepRecord:
    ctx = context(name, model, seed)
    member.step.check(model, ctx)
    return member.step(model, ctx)


@each_case
def test_the_model_is_changed_still_answers_and_the_original_and_teacher_are_not_touched(
    member: Member, name: str
) -> None:
    model = make(name)
    before = outputs(model, name)
    ctx = context(name, model)
    untouched = [state(ctx.original), state(ctx.teacher)]
    config = copy.deepcopy(to_config(member.step))
    record = member.step(model, ctx)
    after = outputs(model, name)
    assert after.shape == before.shape and bool(torch.isfinite(after).all())
    assert not torch.equal(after, before)
    assert same(state(ctx.original), untouched[0]) and same(state(ctx.teacher), untouched[1])
    assert to_config(member.step) == config == record.step
    assert record.title == member.step.title and record.seconds > 0 and record.layers


@each_case
def test_hooks_modes_and_flags_are_as_before(member: Member, name: str) -> None:
    model = make(name).train()
    model.get_submodule("fc1" if name == "perceptron" else "norm" if name == "transformer" else "bn1").eval()
    bias = next(p for p in model.parameters() if p.ndim == 1).requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    run(member, name, model)
    inside = {n.rpartition(".")[0]: n for n, _ in model.named_modules() if n not in modes}  # of layers made of two
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert all(model.get_submodule(n).training == modes[layer] for layer, n in inside.items())
    assert not bias.requires_grad
    folded = member.quantizes_inputs  # a bias may be new there
    now = {n.replace(".second.bias", ".bias") for n, p in model.named_parameters() if not p.requires_grad}
    assert folded or now == frozen
    for module in model.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(module, hooks)
    assert all(p.grad is None for p in model.parameters())


@each_case
def test_the_same_seed_gives_the_same_bits(member: Member, name: str) -> None:
    results, records = [], []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = make(name)
        ctx = context(name, model, seed)
        torch.manual_seed(noise)
        records.append(member.step(model, ctx))
        results.append(state(model))
    assert same(results[0], results[1])
    assert records[0].layers == records[1].layers and records[0].edits == records[1].edits
    assert same(results[0], results[2]) is not member.random


@each_case
def test_edits_and_the_state_rebuild_the_model(member: Member, name: str) -> None:
    model = make(name)
    record = run(member, name, model)
    fresh = make(name, seed=3)
    apply(fresh, record.edits)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, name), outputs(model, name))
    if member.keeps_shapes and member.keeps_floats:
        assert not record.edits


@each_case
def test_every_layer_with_weights_is_accounted_for(member: Member, name: str) -> None:
    """A layer that changed has a row that says so; one that did not, none that claims it."""
    model = make(name)
    before = {n: m for n, m in copy.deepcopy(model).named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    record = run(member, name, model)
    rows = {row.name: row for row in record.layers}
    assert all(row.reason for row in record.layers if row.action == "skipped")
    if "(all)" in rows:
        return
    for n, old in before.items():
        weight = model.get_submodule(n).weight if not isinstance(model.get_submodule(n), nn.Identity) else None
        if weight is not None and old.weight.ndim > 1 and member.keeps_shapes:  # type: ignore[union-attr,operator]
            mine = [r for r in record.layers if r.name in (n, f"{n}.weight") and r.action != "corrected"]
            tied = weight is model.get_submodule("embed").weight if name == "transformer" else False
            assert mine or tied, n
            changed = not torch.equal(weight, old.weight)  # type: ignore[arg-type]
            if mine and not changed:
                assert mine[0].action == "skipped" or mine[0].sparsity == 0
    if not member.keeps_shapes:
        cut = [row for row in record.layers if row.action in ("cut", "factorized")]
        assert cut and all(row.kept is not None and row.of is not None and 0 < row.kept < row.of for row in cut)


@each_case
def test_zeros_and_ties_stay(member: Member, name: str) -> None:
    model = make(name)
    gc.Prune(0.2, correct=False)(model, context(name, model))
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim > 1}
    try:
        run(member, name, model)
    except gc.NothingChangedError:
        pytest.skip("pruned as far already")
    if name == "transformer":
        held = "weight_codes" if isinstance(model.embed, QuantizedLayer) else "weight"
        assert getattr(model.head, held) is getattr(model.embed, held)
    if not member.keeps_shapes:
        share = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
        assert share > 0
        return
    for n, mask in zeros.items():
        layer = model.get_submodule(n.rpartition(".")[0])
        weight = layer.decoded_weight() if isinstance(layer, QuantizedLayer) else model.get_parameter(n)
        assert not weight[mask].any(), n


@each_member
def test_settings_come_back_from_json_and_cannot_be_changed(member: Member) -> None:
    assert recipe_from_json(json.loads(json.dumps(to_config(member.step)))) == member.step
    assert member.step.title and "\n" not in member.step.title
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(member.step, dataclasses.fields(member.step)[0].name, None)  # type: ignore[arg-type]


@each_case
def test_gradients_turned_off_by_the_caller_change_nothing(member: Member, name: str) -> None:
    one, two = make(name), make(name)
    run(member, name, one)
    with torch.no_grad():
        run(member, name, two)
    assert same(state(one), state(two))


@each_case
def test_the_same_step_under_only_leaves_other_layers_alone(member: Member, name: str) -> None:
    model = make(name)
    layer = {"perceptron": "fc2", "convolutional": "conv2", "transformer": "up"}[name]
    trains = isinstance(member.step, (gc.Distill, gc.Finetune, gc.Iterative, gc.Gradual))
    if trains or (name == "transformer" and not member.keeps_shapes):
        pytest.skip("trains the whole model, or units tied to others")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    step = gc.only(layer, dataclasses.replace(member.step, correct=False, **_shorter(member)))  # type: ignore[type-var]
    record = step(model, context(name, model))
    changed = {row.name for row in record.layers if row.action in ("pruned", "quantized", "cut", "factorized")}
    assert changed == {layer}
    for n, value in before.items():
        owner = n.rpartition(".")[0]
        if member.keeps_shapes and owner not in (layer, "bn2") and n in model.state_dict():
            assert torch.equal(model.state_dict()[n], value), n


def _shorter(member: Member) -> dict[str, Any]:
    """One layer alone cannot save as much as all."""
    if getattr(member.step, "to", None) is None or isinstance(member.step, gc.Factorize):
        return {}
    return {"to": gc.Bytes(0.97) if isinstance(member.step, gc.Quantize) else gc.MACs(0.95)}
