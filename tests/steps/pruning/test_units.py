"""What criteria of whole units are given, against what hooks and gates in the forward measure; and what is skipped."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gracile.context import Context
from gracile.criteria import FPGM, OBS, Activation, BatchNormScale, GateFisher
from gracile.data import Data
from gracile.errors import ConfigError, DataError
from gracile.graph import Group, trace
from gracile.losses import cross_entropy
from gracile.patterns import Channels
from gracile.steps import Prune
from gracile.steps.pruning.units import collect_units


class Net(nn.Module):
    """A residual stream behind a stem, an inner convolution with a batch norm, and a perceptron without one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.outer, self.outer_norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)
        self.gates: Tensor | None = None
        for norm in (self.stem_norm, self.norm, self.outer_norm):
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.norm(self.inner(x)))
        y = y if self.gates is None else y * self.gates[:, None, None]
        x = x + self.outer_norm(self.outer(y))
        out: Tensor = self.head(torch.tanh(self.hidden(x.mean((2, 3)))))
        return out


def setup() -> tuple[Net, dict[str, Group], Context]:
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(5, 2, 4, 4, generator=generator), torch.arange(5) % 3) for _ in range(3)]
    data = Data(calibration=[x for x, _ in batches], train=batches, loss=cross_entropy)
    traced = trace(net, lambda m: m(batches[0][0]))
    groups = {g.name: g for g in traced.groups if g.frozen is None}
    original = copy.deepcopy(net)
    return net, groups, Context(data, original, original)


def test_weights_and_norms_of_each_unit() -> None:
    net, groups, context = setup()
    found = collect_units(net, list(groups.values()), {}, FPGM(), 8, context)
    inner = found["inner"]
    assert torch.equal(inner.makers[0], net.inner.weight.detach().flatten(1)) and len(inner.makers) == 1
    assert torch.equal(inner.norm_scales[0], net.norm.weight.detach()[:, None]) and len(inner.norm_scales) == 1
    stream = found["stem"]
    assert sorted(m.shape for m in stream.makers) == [(6, 8), (6, 18)]  # the stem's, and the outer convolution's
    scales = {tuple(s.flatten().tolist()) for s in stream.norm_scales}
    assert scales == {tuple(n.weight.tolist()) for n in (net.stem_norm, net.outer_norm)}
    assert found["hidden"].norm_scales == () and inner.inputs == () and inner.gate_gradient_sq is None


@pytest.mark.parametrize("power", [1, 2])
def test_activations_are_what_the_layers_that_read_the_units_receive(power: int) -> None:
    net, groups, context = setup()
    found = collect_units(net, list(groups.values()), {}, Activation(power), 8, context)
    with torch.no_grad():
        x = torch.relu(net.stem_norm(net.stem(torch.cat(list(context.data.calibration_batches)))))
        y = torch.relu(net.norm(net.inner(x)))
    expected = y.double().abs().pow(power).mean((0, 2, 3))
    torch.testing.assert_close(found["inner"].inputs[0].mean(1), expected, rtol=1e-5, atol=0)  # rows are float32
    patches = nn.functional.unfold(x, 3, padding=1).double().abs().pow(power).mean((0, 2)).reshape(6, 9)
    assert any(t.shape == (6, 9) and torch.allclose(t, patches, rtol=1e-5) for t in found["stem"].inputs)


def test_gate_gradients_are_those_of_a_factor_in_the_forward() -> None:
    net, groups, context = setup()
    found = collect_units(net, [groups["inner"]], {}, GateFisher(), 12, context)
    squares = np.zeros(8)
    examples = [(x[i : i + 1], y[i : i + 1]) for x, y in context.data.train or () for i in range(len(x))][:12]
    for x, y in examples:
        net.gates = torch.ones(8, requires_grad=True)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), net.gates)
        squares += slope.double().numpy() ** 2
    gates = found["inner"].gate_gradient_sq
    assert gates is not None
    np.testing.assert_allclose(gates, squares / 12, rtol=1e-3)  # sums over positions and weights, both in float32


def test_groups_without_a_batch_norm_are_skipped_with_the_reason() -> None:
    net, _, context = setup()
    kept = torch.sort(net.norm.weight.detach().abs().argsort(descending=True)[:4]).values
    before = net.inner.weight.detach().clone()
    step = Prune(0.5, pattern=Channels(), criterion=BatchNormScale(), exclude=("stem", "outer"), correct=False)
    record = step(net, context)
    rows = {row.name: row for row in record.layers}
    assert rows["hidden"].action == "skipped" and "no batch norm with a scale" in str(rows["hidden"].reason)
    assert net.hidden.out_features == 10
    assert torch.equal(net.inner.weight, before[kept])


def test_a_threshold_is_on_the_scores_as_they_are() -> None:
    net, _, context = setup()
    limit = float(net.norm.weight.detach().abs().sort().values[2:4].mean())
    step = Prune(below=limit, pattern=Channels(), criterion=BatchNormScale(), exclude=("stem", "outer"), correct=False)
    step(net, context)
    assert net.inner.out_channels == 5 and float(net.norm.weight.detach().abs().min()) > limit


def test_a_model_without_any_batch_norm_is_an_error_that_says_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    context = Context(Data(calibration=[torch.randn(8, 4)]), net, net)
    with pytest.raises(ConfigError, match=r"0: BatchNormScale: .* no batch norm .*\n  Use another criterion"):
        Prune(0.5, pattern=Channels(), criterion=BatchNormScale())(net, context)
    assert net[0].out_features == 6


def test_damaged_weights_are_refused() -> None:
    net, _, context = setup()
    with torch.no_grad():
        net.hidden.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="'hidden' hold NaN"):
        Prune(0.5, pattern=Channels(), criterion=FPGM())(net, context)
    assert net.inner.out_channels == 8


def test_units_are_exchanged_by_a_criterion_that_judges_sets() -> None:
    """OBS with swap search leaves no more error at the layer that reads the units than without, with as many units."""
    errors = []
    for sweeps in (0, 4):
        net, _, context = setup()
        step = Prune(
            0.5,
            pattern=Channels(),
            criterion=OBS(damping=1e-9, swap_sweeps=sweeps),
            exclude=("stem", "outer", "hidden"),
        )
        original = copy.deepcopy(net)
        step(net, context)
        assert net.inner.out_channels == 4
        left = [int((original.inner.weight == row).flatten(1).all(1).nonzero()) for row in net.inner.weight.detach()]
        with torch.no_grad():
            x = torch.relu(original.stem_norm(original.stem(torch.cat(list(context.data.calibration_batches)))))
            y = torch.relu(original.norm(original.inner(x))).movedim(1, -1).flatten(0, -2).double()
        y = y - y.mean(0)
        target = (y @ original.outer.weight.detach().flatten(1).double().T).numpy()
        solved = np.linalg.lstsq(y[:, left].numpy(), target, rcond=None)[0]
        errors.append(float(((y[:, left].numpy() @ solved - target) ** 2).sum()))
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_gate_fisher_asks_for_labels_before_anything_runs() -> None:
    net, _, context = setup()
    unlabelled = Context(Data(calibration=context.data.calibration), net, net)
    with pytest.raises(ConfigError, match="needs gradients"):
        Prune(0.5, pattern=Channels(), criterion=GateFisher()).check(net, unlabelled)
