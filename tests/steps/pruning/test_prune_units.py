from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.allocate import GlobalRank, MeasuredLoss, Uniform
from gracile.compress import compress
from gracile.context import Context
from gracile.criteria import OBS, Magnitude, Taylor
from gracile.data import Data
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.goal import MACs
from gracile.graph import trace
from gracile.losses import cross_entropy
from gracile.patterns import Channels, Heads, Unstructured
from gracile.recipe import only
from gracile.solvers import LeastSquares
from gracile.steps import Prune
from gracile.steps.pruning.widths import keep_highest
from gracile.surgery import apply


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(8, 4)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out, self.head = 4, nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1)
        out: Tensor = self.head(x + self.out(y)).mean(1)
        return out


SHAPES: dict[Any, tuple[int, ...]] = {nn.Sequential: (16, 6), Residual: (6, 3, 6, 6), Attention: (4, 5, 16)}


def context(model: nn.Module, **settings: Any) -> Context:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(SHAPES[type(model)], generator=generator) for _ in range(9)]
    original = copy.deepcopy(model)
    return Context(Data(calibration=batches), original, original, **settings)


def test_the_units_of_lowest_weight_go_and_the_rest_computes_as_if_they_were_zero() -> None:
    model, original = mlp(), mlp()
    w = [model[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    scores = [np.abs(w[i]).sum(1) + np.abs(w[i + 1]).sum(0) for i in (0, 1)]
    scores = [s / s.mean() for s in scores]
    gone = np.sort(np.concatenate(scores))[: round(0.4 * 18)]
    kept = [np.flatnonzero(s > gone[-1]) for s in scores]
    record = Prune(0.4, pattern=Channels(), correct=False)(model, context(model))
    assert np.array_equal(model[0].weight.detach().numpy(), original[0].weight.detach().numpy()[kept[0]])
    assert np.array_equal(
        model[2].weight.detach().numpy(), original[2].weight.detach().numpy()[np.ix_(kept[1], kept[0])]
    )
    assert np.array_equal(model[4].weight.detach().numpy(), original[4].weight.detach().numpy()[:, kept[1]])
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (
        len(kept[0]),
        len(kept[0]),
        len(kept[1]),
    )
    rows = {row.name: (row.action, row.kept, row.of) for row in record.layers if row.action == "cut"}
    assert rows == {"0": ("cut", len(kept[0]), 10), "2": ("cut", len(kept[1]), 8)}
    assert record.numbers["units_removed"] == 7 and record.numbers["cut_error"] < 1e-10
    assert any("equals the original with the same units zeroed" in note for note in record.notes)


def test_raw_sums_are_compared_where_scores_are_not_normalised() -> None:
    model = mlp()
    w = [model[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    scores = [(w[i] ** 2).sum(1) + (w[i + 1] ** 2).sum(0) for i in (0, 1)]
    gone = np.sort(np.concatenate(scores))[:9]
    step = Prune(0.5, pattern=Channels(normalise=False), criterion=Magnitude(power=2), correct=False)
    step(model, context(model))
    assert [model[0].out_features, model[2].out_features] == [int((s > gone[-1]).sum()) for s in scores]


def test_a_threshold_cuts_neurons_whose_rows_have_a_smaller_norm() -> None:
    model = mlp()
    norms = [np.linalg.norm(model[i].weight.detach().double().numpy(), axis=1) for i in (0, 2)]
    threshold = float(np.sort(np.concatenate(norms))[5:7].mean())
    expected = [model[i].weight.detach().numpy()[n >= threshold] for i, n in zip((0, 2), norms)]
    Prune(below=threshold, pattern=Channels(), correct=False)(model, context(model))
    assert np.array_equal(model[0].weight.detach().numpy(), expected[0])
    assert model[2].out_features == len(expected[1])
    assert model[0].out_features + model[2].out_features == 12


def test_a_threshold_above_everything_leaves_one_unit_of_each() -> None:
    model = mlp()
    Prune(below=1e6, pattern=Channels(), correct=False)(model, context(model))
    assert (model[0].out_features, model[2].out_features) == (1, 1)


def test_uniform_takes_the_same_share_of_each() -> None:
    model = mlp()
    Prune(0.5, pattern=Channels(), allocation=Uniform(), correct=False)(model, context(model))
    assert (model[0].out_features, model[2].out_features) == (5, 4)


def test_units_tied_by_a_residual_are_cut_together_and_the_batch_norm_with_them() -> None:
    model, original = residual(), residual()
    record = Prune(0.4, pattern=Channels(), correct=False)(model, context(model))
    width, inner = model.stem.out_channels, model.a.out_channels
    assert model.b.out_channels == model.a.in_channels == model.head.in_features == width < 8
    assert model.norm.num_features == len(model.norm.running_mean) == model.b.in_channels == inner <= 12  # type: ignore[arg-type]
    assert record.numbers["cut_error"] < 1e-10
    x = context(model).data.calibration_batches[0]  # type: ignore[index]
    with torch.no_grad():
        assert model(x).shape == original(x).shape


def test_correction_lowers_the_output_error_of_the_cut() -> None:
    errors = []
    for correct in (True, False):
        model, original = residual(), residual()
        record = Prune(0.4, pattern=Channels(), correct=correct, repair=None)(model, context(model))
        fresh = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            errors.append(float((model(fresh) - original(fresh)).square().mean()))
        if correct:
            assert record.numbers["output_error"] < record.numbers["output_error_before_correction"]
    assert errors[0] < errors[1]


def test_heads_are_cut_whole_and_the_count_that_forward_reads_follows() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    before = model.qkv.weight.detach().view(3, 4, 4, 16)
    scores = before.double().abs().sum((0, 2, 3)) + model.out.weight.detach().double().abs().sum(0).view(4, 4).sum(1)
    kept = sorted(scores.argsort(descending=True)[:2].tolist())
    record = Prune(0.5, pattern=Heads(), correct=False)(model, context(model))
    assert model.heads == 2 and model.qkv.out_features == 24 and model.out.in_features == 8
    assert torch.equal(model.qkv.weight.view(3, 2, 4, 16), before[:, kept])
    assert [(row.kept, row.of) for row in record.layers if row.action == "cut"] == [(2, 4)]


class Encoder(nn.Module):
    """Attention and a wide layer beside it, added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(16, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu()).mean(1) + self.attention(x)
        return out


def test_several_patterns_share_one_budget() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    data = Data(calibration=[torch.randn(4, 5, 16) for _ in range(3)])
    patterns = (Channels(multiple_of=4), Heads())
    step = Prune(
        to=MACs(0.6), pattern=patterns, criterion=OBS(), allocation=MeasuredLoss(power=1.0), repair=LeastSquares()
    )
    small = compress(model, step, data)
    rows = {row.kind: (row.kept, row.of) for row in small.report.steps[0].layers if row.action == "cut"}
    assert set(rows) == {"channels", "heads"} and rows["channels"][0] % 4 == 0
    assert small.model.attention.heads == rows["heads"][0] < 4
    macs = [trace(m, lambda net: net(torch.zeros(1, 5, 16))).macs for m in (small.model, model)]
    assert macs[0] <= 0.6 * macs[1]
    assert step.title == "Prune channels and heads to MACs(0.6) by OBS"


@pytest.mark.parametrize("pattern", [(), (Channels(), Unstructured()), (Heads(), "channels")])
def test_only_kinds_of_units_go_together(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="not a pattern"):
        Prune(0.5, pattern=pattern)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def test_hidden_units_of_a_recurrent_layer_are_cut() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    original = copy.deepcopy(model)
    data = Data(calibration=[torch.randn(4, 7, 6) for _ in range(2)])
    record = Prune(0.3, pattern=Channels(), correct=False)(model, Context(data, original, original))
    assert model.rnn.hidden_size == model.head.in_features == 7 and model.rnn.weight_hh_l0.shape == (28, 7)
    assert record.numbers["cut_error"] < 1e-10


def test_each_stacked_recurrent_layer_keeps_its_own_highest_units_and_as_many() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    model.rnn = nn.LSTM(6, 10, 2, batch_first=True).eval()
    original = copy.deepcopy(model)
    data = Data(calibration=[torch.randn(4, 7, 6) for _ in range(2)])
    Prune(0.3, pattern=Channels(), correct=False)(model, Context(data, original, original))
    old = {name: p.detach().double().abs() for name, p in original.rnn.named_parameters()}
    kept = []
    for layer, reader in enumerate((old["weight_ih_l1"], original.head.weight.detach().double().abs())):
        made, recurrent = old[f"weight_ih_l{layer}"], old[f"weight_hh_l{layer}"]
        rows = made.sum(1).view(4, 10).sum(0) + recurrent.sum(1).view(4, 10).sum(0)
        kept.append(sorted((rows + recurrent.sum(0) + reader.sum(0)).argsort(descending=True)[:7].tolist()))
    assert kept[0] != kept[1]
    for layer, units in enumerate(kept):
        expected = getattr(original.rnn, f"weight_hh_l{layer}").view(4, 10, 10)[:, units][:, :, units]
        assert torch.equal(getattr(model.rnn, f"weight_hh_l{layer}").view(4, 7, 7), expected)
    assert torch.equal(
        model.rnn.weight_ih_l1.view(4, 7, 7), original.rnn.weight_ih_l1.view(4, 10, 10)[:, kept[1]][:, :, kept[0]]
    )


def test_a_gradient_criterion_ranks_units_by_summed_scores() -> None:
    model = mlp()
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    squares = [torch.zeros_like(model[i].weight, dtype=torch.float64) for i in (0, 2, 4)]
    for i in range(16):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), (x, y[i : i + 1])).backward()
        for total, layer in zip(squares, (0, 2, 4)):
            total += model[layer].weight.grad.double().square()
    model.zero_grad()
    score = [model[i].weight.detach().double().square() * g / 16 for i, g in zip((0, 2, 4), squares)]
    units = [score[0].sum(1) + score[1].sum(0), score[1].sum(1) + score[2].sum(0)]
    ranked = torch.cat([u / u.mean() for u in units]).sort().values[:9]
    step = Prune(0.5, pattern=Channels(), criterion=Taylor(), correct=False)
    original = copy.deepcopy(model)
    step(model, Context(Data(train=[(x, y)], loss=cross_entropy), original, original))
    assert [model[0].out_features, model[2].out_features] == [int((u / u.mean() > ranked[-1]).sum()) for u in units]


def test_edits_rebuild_the_model() -> None:
    for make in (mlp, residual):
        model, fresh = make(), make()
        record = Prune(0.4, pattern=Channels())(model, context(model))
        apply(fresh, record.edits)
        fresh.load_state_dict(model.state_dict())
        x = torch.randn(SHAPES[type(model)])
        with torch.no_grad():
            assert torch.equal(fresh(x), model(x))


def test_layers_are_chosen_by_patterns_and_ties_to_others_are_named() -> None:
    model = mlp()
    record = only("0", Prune(0.5, pattern=Channels(), correct=False))(model, context(model))
    assert (model[0].out_features, model[2].out_features) == (5, 8)
    assert {row.name for row in record.layers} == {"0"}
    model2 = residual()
    record = Prune(0.5, pattern=Channels(), exclude=("stem",), correct=False)(model2, context(model2))
    skipped = {row.name: row.reason for row in record.layers if row.action == "skipped"}
    assert any(reason == "tied to 'stem', which is not selected" for reason in skipped.values())
    assert model2.stem.out_channels == 8 and model2.a.out_channels == 6


def test_a_batch_norm_goes_along_with_its_convolution_unless_excluded() -> None:
    model = residual()
    only("a", Prune(0.5, pattern=Channels(), correct=False))(model, context(model))
    assert model.a.out_channels == model.norm.num_features == 6 and model.stem.out_channels == 8
    model = residual()
    record = Prune(0.3, pattern=Channels(), exclude=("norm",), correct=False)(model, context(model))
    assert model.norm.num_features == 12 and model.stem.out_channels < 8
    assert any(row.reason == "tied to 'norm', which is not selected" for row in record.layers)


def test_impossible_requests_say_why() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(ConfigError, match=r"nothing that Channels\(\) can cut[\s\S]*output"):
        Prune(0.5, pattern=Channels())(model, context(model))
    with pytest.raises(ConfigError, match=r"nothing that Heads\(\) can cut"):
        Prune(0.5, pattern=Heads())(mlp(), context(mlp()))
    with pytest.raises(ConfigError, match="No layer matches 'x'"):
        Prune(0.5, pattern=Channels(), exclude=("x",))(mlp(), context(mlp()))
    with pytest.raises(NothingChangedError, match="no unit was removed from 2 groups"):
        Prune(below=1e-9, pattern=Channels())(mlp(), context(mlp()))
    with pytest.raises(NothingChangedError, match="no unit was removed"):
        Prune(0.01, pattern=Channels())(mlp(), context(mlp()))


def test_data_are_required_at_the_check() -> None:
    model = mlp()
    with pytest.raises(DataError, match=r"Channels\(\) runs the model once"):
        Prune(0.5, pattern=Channels()).check(model, Context(Data(), model, model))


def test_damaged_weights_leave_the_model_as_it_was() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    for step in (Prune(0.5, pattern=Channels()), Prune(below=0.5, pattern=Channels())):
        with pytest.raises(DataError, match="NaN"):
            step(model, context(model))
    assert model[0].out_features == 10


@dataclass(frozen=True)
class Fake:
    name: str
    units: int
    tied_count: str | None = None
    multiple_of: int = 1
    kind: str = "channels"


@pytest.mark.parametrize(
    ("removed", "multiple", "counts"),
    [
        ({"a": 3, "b": 0, "c": 9}, 1, {"a": 17, "b": 10, "c": 11}),
        ({"a": 3, "b": 0, "c": 9}, 8, {"a": 16, "b": 10, "c": 8}),
        ({"a": 19, "b": 9, "c": 19}, 1, {"a": 1, "b": 1, "c": 1}),
        ({"a": 19, "b": 9, "c": 19}, 4, {"a": 4, "b": 4, "c": 4}),
        ({"a": 1, "b": 5, "c": 1}, 8, {"a": 16, "b": 8, "c": 16}),
        ({"a": 1, "b": 1, "c": 1}, 16, {"a": 16, "b": 10, "c": 16}),
    ],
)
def test_kept_counts_are_rounded_to_multiples(removed: Any, multiple: int, counts: dict[str, int]) -> None:
    groups: Any = [Fake("a", 20), Fake("b", 10), Fake("c", 20)]
    scores = {g.name: torch.rand(g.units) for g in groups}
    keep = keep_highest(groups, scores, removed, Prune(0.1, pattern=Channels(multiple_of=multiple)))
    assert {g.name: len(keep.get(g.name, range(g.units))) for g in groups} == counts
    for name, kept in keep.items():
        assert kept == sorted(kept)
        gone = sorted(set(range(scores[name].numel())) - set(kept))
        assert float(scores[name][kept].min()) >= float(scores[name][gone].max())


@pytest.mark.parametrize("multiple", [1, 8])
def test_groups_of_one_count_keep_the_same_number(multiple: int) -> None:
    groups: Any = [Fake("a", 32, "n"), Fake("b", 32, "n"), Fake("c", 32)]
    scores = {g.name: torch.rand(32) for g in groups}
    keep = keep_highest(groups, scores, {"a": 16, "b": 8, "c": 0}, Prune(0.1, pattern=Channels(multiple_of=multiple)))
    assert len(keep["a"]) == len(keep["b"]) == (20 if multiple == 1 else 16)  # 2.5 multiples round to even
    assert "c" not in keep and keep["a"] != keep["b"]


def test_ranking_by_cost_needs_the_costs_of_units() -> None:
    model = mlp()
    w = [model[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    per_unit = [6 + 1 + 8, 10 + 1 + 3]  # weights and bias of a row, and the column of the next layer
    scores = [(np.abs(w[i]).sum(1) + np.abs(w[i + 1]).sum(0)) / per_unit[i] for i in (0, 1)]
    gone = np.sort(np.concatenate(scores))[:9]
    step = Prune(0.5, pattern=Channels(normalise=False), allocation=GlobalRank(per_cost=True), correct=False)
    step(model, context(model))
    assert [model[0].out_features, model[2].out_features] == [int((s > gone[-1]).sum()) for s in scores]
