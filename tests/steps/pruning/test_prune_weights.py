from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.allocate import GlobalRank
from gracile.context import Context
from gracile.criteria import Magnitude, Taylor
from gracile.data import Data
from gracile.errors import ConfigError, DataError, NothingChangedError
from gracile.goal import MACs
from gracile.losses import cross_entropy
from gracile.patterns import NM, Channels, Heads, Unstructured
from gracile.recipe import only
from gracile.select import Select
from gracile.steps import Prune
from gracile.steps.pruning.prune_weights import prunable_weights


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7)
    ).eval()


def context(model: nn.Module, data: Data | None = None, **settings: Any) -> Context:
    original = copy.deepcopy(model)
    return Context(data or Data(), original, original, **settings)


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.ndim > 1}


def test_a_threshold_removes_exactly_what_lies_below_it() -> None:
    model = net()
    before, others = weights(model), {n: p.clone() for n, p in model.named_parameters() if p.ndim == 1}
    record = Prune(below=0.1)(model, context(model))
    for name, w in weights(model).items():
        assert np.array_equal(w, np.where(np.abs(before[name]) < 0.1, 0, before[name]))
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    zero = sum((w == 0).sum() for w in weights(model).values()) / sum(w.size for w in before.values())
    assert record.numbers["sparsity"] == pytest.approx(zero) and 0.1 < zero < 0.9


def test_a_weight_at_the_threshold_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.5, -0.5, 0.49999997]])
    Prune(below=0.5)(model, context(model))
    assert model[0].weight.tolist() == [[0.5, -0.5, 0.0]]


@pytest.mark.parametrize("fraction", [0.003, 0.1, 1 / 3, 0.5, 0.777, 0.9])
@pytest.mark.parametrize("allocation", [None, GlobalRank()], ids=["uniform", "global"])
def test_a_fraction_is_met_exactly_by_the_smallest(fraction: float, allocation: Any) -> None:
    model = net()
    before = weights(model)
    record = Prune(fraction, allocation=allocation)(model, context(model))
    after = weights(model)
    total = sum(w.size for w in before.values())
    assert sum(int((w == 0).sum()) for w in after.values()) == round(fraction * total)
    for name, w in after.items():
        removed = int((w == 0).sum())
        if allocation is None:
            assert abs(removed - fraction * w.size) < 1
        expected = np.sort(np.abs(before[name]).ravel())[removed:]
        assert np.array_equal(np.sort(np.abs(w[w != 0])), expected)
    if allocation is not None:
        gone = [np.abs(before[n][after[n] == 0]).max() for n in before if (after[n] == 0).any()]
        stay = [np.abs(after[n][after[n] != 0]).min() for n in before]
        assert max(gone) <= min(stay)
    assert {row.name for row in record.layers} == {"0", "5"}


def test_two_of_four_keeps_the_larger_two_of_every_four() -> None:
    model = net()
    before = weights(model)
    record = Prune(pattern=NM(2, 4))(model, context(model))
    expected = before["5.weight"].reshape(-1, 4).copy()
    for row in expected:
        row[np.argsort(np.abs(row))[:2]] = 0
    assert np.array_equal(weights(model)["5.weight"], expected.reshape(7, 32))
    skipped = {row.name: row.reason for row in record.layers if row.action == "skipped"}
    assert skipped == {"0": "27 columns are no multiple of 4"}
    assert np.array_equal(weights(model)["0.weight"], before["0.weight"])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 6), nn.LSTM(6, 4, batch_first=True)
        self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 9)
        self.out = nn.Linear(6, 9)
        self.out.weight = self.embed.weight
        self.free = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(x))
        out: Tensor = self.head(self.attend(y, y, y)[0])
        return out


def test_all_kinds_of_layers_are_found_and_a_tied_weight_once() -> None:
    found = prunable_weights(Recurrent())
    assert found == {
        "embed.weight": "Embedding",
        "rnn.weight_ih_l0": "LSTM",
        "rnn.weight_hh_l0": "LSTM",
        "attend.in_proj_weight": "MultiheadAttention",
        "attend.out_proj.weight": "NonDynamicallyQuantizableLinear",
        "head.weight": "Linear",
    }


def test_recurrent_weights_are_pruned_where_they_are_used_and_ties_stay() -> None:
    model = Recurrent().eval()
    x = torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        model(x)
    Prune(0.6)(model, context(model))
    assert model.out.weight is model.embed.weight
    fresh = Recurrent().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    for name in prunable_weights(model):
        p = model.get_parameter(name)
        assert abs(int((p == 0).sum()) - 0.6 * p.numel()) < 1


def test_patterns_choose_layers() -> None:
    for step, pruned in (
        (Prune(0.5, exclude=("0",)), {"5"}),
        (only("0", Prune(0.5)), {"0"}),
        (only(("0", "5"), Prune(0.5, exclude=("5",))), {"0"}),
    ):
        model = net()
        before = weights(model)
        record = step(model, context(model))
        assert {row.name for row in record.layers if row.action == "pruned"} == pruned
        for name in {"0", "5"} - pruned:
            assert np.array_equal(weights(model)[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize(
    ("step", "select", "message"),
    [
        (Prune(0.5, exclude=("nothing*",)), None, r"No layer matches 'nothing\*'"),
        (Prune(0.5, exclude=("0", "5")), None, "leaves no layer"),
        (Prune(0.5), Select().narrowed("1"), "leaves no layer"),
    ],
)
def test_selections_of_nothing_are_refused(step: Prune, select: Any, message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        step(model, context(model, select=select))


def test_a_model_pruned_already_is_said_to_be() -> None:
    model = net()
    Prune(0.5)(model, context(model))
    before = weights(model)
    with pytest.raises(NothingChangedError, match=r"no weight was removed from 2 layers[\s\S]*pruned already"):
        Prune(0.5)(model, context(model))
    Prune(0.6)(model, context(model))
    after = weights(model)
    for name, w in after.items():
        assert not w[before[name] == 0].any()
        assert abs(int((w == 0).sum()) - 0.6 * w.size) < 1


def test_a_threshold_below_everything_names_the_lowest_score() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[0.5, -0.25], [1.0, 2.0]])
    with pytest.raises(NothingChangedError, match=r"the lowest score is 0.25, not below 0.001"):
        Prune(below=1e-3)(model, context(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_named_before_anything_is_changed(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[5].weight[3, 3] = bad
    before = weights(model)
    with pytest.raises(DataError, match=r"'5\.weight' holds NaN or infinity"):
        Prune(0.5)(model, context(model))
    for name, w in weights(model).items():
        assert np.array_equal(w, before[name], equal_nan=True)


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match="no layer with weights"):
        Prune(0.5)(model, context(model))


def test_correction_lowers_the_output_error_and_leaves_the_weights_alone() -> None:
    corrected, plain = net(), net()
    batches = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(9)]
    data = Data(calibration=batches)
    original = net()
    record = Prune(0.6)(corrected, context(corrected, data))
    Prune(0.6, correct=False)(plain, context(plain, data))
    for name, w in weights(plain).items():
        assert np.array_equal(weights(corrected)[name], w)
    fresh = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(77)) + 0.5
    with torch.no_grad():
        errors = [float((m(fresh) - original(fresh)).square().mean()) for m in (corrected, plain)]
    assert errors[0] < 0.75 * errors[1]
    assert record.numbers["output_error"] < record.numbers["output_error_before_correction"]
    assert any("lowered the output error" in note for note in record.notes)


def test_a_gradient_criterion_ranks_by_its_scores() -> None:
    """Against w²·E[g²] of single examples from a loop."""
    model = net()
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 7
    squares = {name: torch.zeros_like(model.get_parameter(name)) for name in ("0.weight", "5.weight")}
    for i in range(12):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), (x, y[i : i + 1])).backward()
        for name in squares:
            squares[name] += model.get_parameter(name).grad.square()  # type: ignore[union-attr]
    model.zero_grad()
    scores = {n: (model.get_parameter(n).detach().square() * g).flatten() for n, g in squares.items()}
    step = Prune(0.4, criterion=Taylor(), correct=False)
    step(model, context(model, Data(train=[(x, y)], loss=cross_entropy)))
    for name, score in scores.items():
        gone = model.get_parameter(name).flatten() == 0
        # The boundary may lie between scores that float32 sums in another order cannot tell apart.
        assert float(score[gone].max()) <= float(score[~gone].min()) * (1 + 1e-4)


def test_gradients_without_labelled_data_are_refused_at_the_check() -> None:
    model = net()
    with pytest.raises(ConfigError, match="Taylor needs gradients"):
        Prune(0.5, criterion=Taylor()).check(model, context(model))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Prune(),
        lambda: Prune(0.0),
        lambda: Prune(1.0),
        lambda: Prune(-0.1),
        lambda: Prune(30),
        lambda: Prune(float("nan")),
        lambda: Prune(True),
        lambda: Prune("0.3"),  # type: ignore[arg-type]
        lambda: Prune(0.3, below=0.1),
        lambda: Prune(below=0),
        lambda: Prune(below=float("inf")),
        lambda: Prune(0.5, pattern=NM(2, 4)),
        lambda: Prune(to=0.5, pattern=Channels()),  # type: ignore[arg-type]
        lambda: Prune(to=MACs(0.5)),
        lambda: Prune(0.3, to=MACs(0.5), pattern=Channels()),
        lambda: Prune(0.3, criterion=Magnitude),
        lambda: Prune(0.3, criterion="magnitude"),
        lambda: Prune(0.3, pattern=Channels),
        lambda: Prune(0.3, pattern="channels"),
        lambda: Prune(0.3, examples=0),
        lambda: Prune(0.3, exclude="conv1"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        bad()


def test_titles_are_for_people() -> None:
    assert Prune(0.3).title == "Prune 30% of the weights by Magnitude"
    assert Prune(below=1e-3, pattern=Unstructured()).title == "Prune weights below 0.001 by Magnitude"
    assert Prune(0.25, pattern=Heads()).title == "Prune 25% of the heads by Magnitude"
    assert "channels to MACs" in Prune(to=MACs(0.5), pattern=Channels()).title
